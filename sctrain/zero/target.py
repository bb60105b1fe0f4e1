"""A target network: an average of the student, or an earlier self of it, sharded like everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sctrain.zero.construction import partitioned
from sctrain.zero.engine import FrozenEngine
from sctrain.zero.pieces import Piece
from sctrain.zero.shards import Shards

KIND = "target"


class TargetNetwork:
    """theta- <- keep theta- + (1 - keep) theta, in float32 on the shards; its weights take no gradients.

    It starts as the student.
    """

    def __init__(
        self,
        shards: Shards,
        network: nn.Module,
        config: dict[str, Any],
        device: torch.device,
        *,
        shares_masks: bool = True,
    ):
        """`network` has the student's shape; its weights do not matter. All ranks take part.

        `shares_masks` has it draw the dropout masks that the student drew; else no unit of it drops out.
        """
        self._shards, self._module = shards, network
        self._engine = FrozenEngine(network, partitioned(config), device)
        network.train(shares_masks)
        self._track = {shard.name: shard.master.clone() for shard in shards}
        self.refresh()

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    @torch.no_grad()
    def update(self, keep: float) -> None:
        """Follow an optimizer step; `keep` in [0, 1]."""
        if keep == 1:
            return
        torch._foreach_lerp_(list(self._track.values()), [shard.master for shard in self._shards], 1 - keep)
        self.refresh()

    def refresh(self) -> None:
        """Let the engine compute with the present values."""
        self._shards.copy_to(self._module, self._track)

    def pieces(self) -> dict[str, Piece]:
        """The values as this rank holds them, by `target/NAME`."""
        return {
            f"{KIND}/{shard.name}": Piece(self._track[shard.name], shard.shape, shard.start) for shard in self._shards
        }

    def load(self, key: str, values: Tensor) -> None:
        """Overwrite one parameter, its key that of `pieces`; `refresh` makes it count."""
        self._track[key.partition("/")[2]].copy_(values)
