"""The contact with DeepSpeed's internals that tangents need, kept in one place.

ZeRO-3 wraps every module's inputs and outputs in identity autograd.Functions (`pre_bwd_fn`, `post_bwd_fn`) that
trigger the gathering of parameters in backward. They lack a forward-mode rule; the rule of an identity is the
identity.
"""

import torch
from torch import Tensor, nn

from models.tangent.dual import Dual

_HOOKS = ("pre_bwd_fn", "post_bwd_fn")


class _OnValues:
    """Applies an identity autograd.Function to the value of a Dual, whose tangent passes by."""

    def __init__(self, function: type[torch.autograd.Function]):
        self._function = function

    def apply(self, x: Tensor) -> Tensor:
        if isinstance(x, Dual):
            return Dual(self._function.apply(x.value), x.tangent)
        return self._function.apply(x)


def carry_tangents(module: nn.Module) -> None:
    """Let Duals pass ZeRO-3's hooks of a module that DeepSpeed has already wrapped."""
    for submodule in module.modules():
        for name in _HOOKS:
            hook = vars(submodule).get(name)
            assert hook is not None, (
                f"DeepSpeed no longer sets {name} on modules: tangents need a new way through ZeRO-3"
            )
            setattr(submodule, name, _OnValues(hook))
