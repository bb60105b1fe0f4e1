"""How ZeRO-3 cuts a flattened tensor: ceil(numel / world) elements per rank, the last ranks' pieces short or empty."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


def interval(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Half-open interval [start, stop) of the flattened tensor that `rank` holds."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


@dataclass(frozen=True)
class Piece:
    """One rank's part [start, stop) of a flattened tensor."""

    local: Tensor  # (stop - start,), without ZeRO's padding
    shape: tuple[int, ...]  # of the whole tensor
    start: int

    def __post_init__(self) -> None:
        assert self.local.dim() == 1 and 0 <= self.start <= self.stop <= math.prod(self.shape), self

    @property
    def stop(self) -> int:
        return self.start + self.local.numel()


def row_parts(start: int, stop: int, width: int) -> Iterator[tuple[slice, slice]]:
    """The interval [start, stop) of a flattened matrix cut where rows of `width` begin: whole rows are in one part.

    Yields (rows of the matrix, their part of the interval, which begins at 0); at most three, the outer two of one row.
    """
    begin = start
    while begin < stop:
        row = begin // width
        whole = (stop - begin) // width if begin % width == 0 else 0
        end = begin + whole * width if whole else min(stop, (row + 1) * width)
        yield slice(row, row + max(whole, 1)), slice(begin - start, end - start)
        begin = end
