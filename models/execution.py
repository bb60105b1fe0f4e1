"""How a network is evaluated. Its function, its parameters and its name do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.attention import Backend
from models.tangent.checkpointing import checkpointed
from models.tangent.dual import Dual


@dataclass(frozen=True)
class Execution:
    """Choices that trade time for memory."""

    attention: Backend = "auto"  # how attention with tangents is computed
    checkpointing: bool = False  # blocks keep their inputs alone, and are evaluated again in backward
    compiled: bool = False  # blocks without tangents go through torch.compile

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """One block of the network."""
        if self.checkpointing:
            return checkpointed(partial(self._evaluate, block), *inputs)
        return self._evaluate(block, *inputs)

    def _evaluate(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Tangents stay out of compiled code, which can drop them without a word (pytorch#192985)."""
        if self.compiled and not any(isinstance(x, Dual) for x in inputs):
            return _compiled(block)(*inputs)
        return block(*inputs)


def _compiled(block: nn.Module) -> nn.Module:
    """Made once, and kept beside the block's submodules, not among them."""
    if "_compiled" not in vars(block):
        vars(block)["_compiled"] = torch.compile(block)
    return vars(block)["_compiled"]
