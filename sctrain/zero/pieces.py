"""How ZeRO-3 cuts a flattened tensor: ceil(numel / world) elements per rank, the last ranks' pieces short or empty."""

import math
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
