"""Means of losses and diagnostics over a status interval, summed on the device and reduced once per interval."""

import math

import torch
from torch import Tensor

from sctrain.objectives.base import Draws, Loss
from sctrain.zero.world import World

# Bins of t, in rad: [0, 0.4), [0.4, 0.8), [0.8, 1.2), [1.2, pi/2].
_BIN_EDGES = (0.4, 0.8, 1.2)


class Monitor:
    """Accumulates per-sample values; `means` empties it.

    Samples whose output or tangent overflowed, or whose loss is not finite, are counted and left out of the means, so
    that these stay readable; the trainer bounds their share.
    """

    def __init__(self, world: World):
        self._world = world
        self._edges = torch.tensor(_BIN_EDGES, device=world.device)
        self._sums: dict[str, Tensor] = {}
        self._samples = torch.zeros(2, device=world.device, dtype=torch.float64)  # dropped, all
        self._warmup = 1.0

    def add(self, draws: Draws, loss: Loss) -> None:
        """Count one micro-batch."""
        per_sample = loss.per_sample.detach()
        sound = per_sample.isfinite()
        if loss.dropped is not None:
            sound &= ~loss.dropped
        self._samples += torch.stack([(~sound).sum(), sound.new_tensor(len(sound), dtype=torch.long)])
        self._warmup = draws.r
        for name, values in {"loss": per_sample, **loss.diagnostics}.items():
            self._accumulate(name, values, loss.times.get(name, draws.t), sound)

    def _accumulate(self, name: str, values: Tensor, t: Tensor, sound: Tensor) -> None:
        bins = torch.bucketize(t, self._edges, right=True)
        sums = self._sums.setdefault(
            name, torch.zeros(2, len(_BIN_EDGES) + 1, dtype=torch.float64, device=values.device)
        )
        sums.index_add_(1, bins, torch.stack([values.double().where(sound, 0), sound.double()]))

    def means(self) -> dict[str, float]:
        """Means over all ranks since the last call: `loss/all`, `loss/t0.4-0.8`, ... and what was dropped.

        `loss/all` is nan where no sample was left.
        """
        dropped, samples = self._world.sum(self._samples).tolist()
        scalars = {"guard/dropped_samples": dropped, "guard/dropped_share": dropped / samples}
        scalars["objective/warmup"] = self._warmup
        edges = (0.0, *_BIN_EDGES, math.pi / 2)
        for name, sums in self._sums.items():
            total, count = self._world.sum(sums)
            scalars[f"{name}/all"] = (total.sum() / count.sum()).item()
            for i in range(len(total)):
                if count[i] > 0:
                    scalars[f"{name}/t{edges[i]:.1f}-{edges[i + 1]:.1f}"] = (total[i] / count[i]).item()
        self._sums.clear()
        self._samples.zero_()
        return scalars
