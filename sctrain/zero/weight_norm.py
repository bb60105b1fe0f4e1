"""Forced weight normalisation (EDM2 section 2.3) of the fp32 masters, on the shards.

In a forward under ZeRO-3 it would be lost: what a module changes there is a copy that was gathered for the while. So
it follows the optimizer's step: squares are summed row by row over each rank's interval, all of them are added over the
ranks in one all-reduce, and every rank divides its own part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.magnitude import EPSILON, normalized_weights
from sctrain.zero.pieces import row_parts
from sctrain.zero.shards import Shard, Shards


class ForcedWeightNorm:
    """Every output channel of the weights that `module` uses by direction alone to W / (rms(W) + 1e-4).

    It does nothing to a network without such weights.
    """

    def __init__(self, shards: Shards, module: nn.Module):
        self._shards, self._weights = shards, [shards[name] for name in normalized_weights(module)]

    @torch.no_grad()
    def apply(self) -> None:
        """To be called on all ranks after each applied step of the optimizer, and once for weights to start with."""
        if not self._weights:
            return
        sums = torch.cat([_row_sums(shard) for shard in self._weights])
        dist.all_reduce(sums)
        with self._shards.rescaling():
            for shard, of_rows in zip(
                self._weights, sums.split([shard.shape[0] for shard in self._weights]), strict=True
            ):
                rms = (of_rows / (shard.numel // shard.shape[0])).sqrt()
                shard.scale_rows((1 / (rms + EPSILON)).float())


def _row_sums(shard: Shard) -> Tensor:
    """Of squares of this rank's part, float64, zero for rows of which it has nothing: (rows,)."""
    master = shard.master
    sums = master.new_zeros(shard.shape[0], dtype=torch.float64)
    for rows, part in row_parts(shard.start, shard.stop, shard.numel // shard.shape[0]):
        count = rows.stop - rows.start
        sums[rows] = master[part].view(count, -1).square().sum(dim=1, dtype=torch.float64)
    return sums
