"""How a network is evaluated. Its function, its parameters and its name do not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.attention import Backend
from models.tangent.checkpointing import checkpointed


@dataclass(frozen=True)
class Execution:
    """Choices that trade time for memory."""

    attention: Backend = "auto"  # how attention with tangents is computed
    checkpointing: bool = False  # blocks keep their inputs alone, and are evaluated again in backward

    def run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """One block of the network."""
        return checkpointed(block, *inputs) if self.checkpointing else block(*inputs)
