"""The contact with DeepSpeed's internals that tangents need, kept in one place.

ZeRO-3 wraps every module's inputs and outputs in identity autograd.Functions (`pre_bwd_fn`, `post_bwd_fn`) that
trigger the gathering of parameters in backward. They lack a forward-mode rule; the rule of an identity is the
identity.
"""

from torch import nn

_HOOKS = ("pre_bwd_fn", "post_bwd_fn")


def carry_tangents(module: nn.Module) -> None:
    """Let dual tensors pass ZeRO-3's hooks of a module that DeepSpeed has already wrapped."""
    for submodule in module.modules():
        for name in _HOOKS:
            hook = vars(submodule).get(name)
            assert hook is not None, (
                f"DeepSpeed no longer sets {name} on modules: tangents need a new way through ZeRO-3"
            )
            hook.jvp = staticmethod(lambda ctx, tangent: tangent.view_as(tangent))
