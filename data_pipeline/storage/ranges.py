"""The ranges of one object that are wanted -> the ranges to ask for, and back."""

from collections.abc import Sequence
from typing import NamedTuple

NEAR_BYTES = 4096  # a gap that costs less to fetch than another request
PART_BYTES = 8 * 2**20  # of one request; longer ranges are fetched by several at once

Range = tuple[int, int]  # (offset, size)


class Piece(NamedTuple):
    """A stretch of the object that holds one or more of the ranges."""

    offset: int
    size: int
    rows: list[int]  # the ranges inside

    @property
    def parts(self) -> list[Range]:
        """What to ask for."""
        ends = range(self.offset, self.offset + self.size, PART_BYTES)
        return [(start, min(PART_BYTES, self.offset + self.size - start)) for start in ends]


def pieces(ranges: Sequence[Range]) -> list[Piece]:
    """Ranges that are near each other joined, as far as they fit into one request."""
    found: list[Piece] = []
    for row in sorted(range(len(ranges)), key=lambda row: ranges[row]):
        offset, size = ranges[row]
        if found:
            last = found[-1]
            end = max(last.offset + last.size, offset + size)
            near = offset <= last.offset + last.size + NEAR_BYTES
            if near and end - last.offset <= max(PART_BYTES, last.size):
                found[-1] = Piece(last.offset, end - last.offset, [*last.rows, row])
                continue
        found.append(Piece(offset, size, [row]))
    return found


def assemble(ranges: Sequence[Range], wanted: Sequence[Piece], fetched: Sequence[bytes]) -> list[bytes]:
    """The ranges, cut out of the parts of all pieces."""
    result = [b""] * len(ranges)
    parts = iter(fetched)
    for piece in wanted:
        data = b"".join([next(parts) for _ in piece.parts])
        for row in piece.rows:
            start = ranges[row][0] - piece.offset
            whole = start == 0 and ranges[row][1] == len(data)
            result[row] = data if whole else data[start : start + ranges[row][1]]
    return result
