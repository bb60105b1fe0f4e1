"""Activation checkpointing for (value, tangent): backward makes the value again, the tangent never."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.tangent.dual import Dual
from models.tangent.randomness import RandomState


def checkpointed(block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """block(*inputs) that keeps nothing but its inputs for backward. Dropout masks are drawn again, the same ones.

    At least one input must require a gradient, or the block's parameters would get none.
    """
    if not torch.is_grad_enabled():
        return block(*inputs)
    values = [x.value if isinstance(x, Dual) else x for x in inputs]
    tangents = [x.tangent if isinstance(x, Dual) else None for x in inputs]
    assert any(value.requires_grad for value in values), "no input of the checkpointed block requires a gradient"
    value, tangent = _ValueAgain.apply(block, tangents, *values)
    return value if tangent is None else Dual(value, tangent)


class _ValueAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, tangents, *values):
        ctx.block, ctx.randomness = block, RandomState(values[0].device)
        ctx.save_for_backward(*values)
        out = block(*(v if t is None else Dual(v.detach(), t) for v, t in zip(values, tangents, strict=True)))
        if not isinstance(out, Dual):
            return out, None
        ctx.mark_non_differentiable(out.tangent)
        return out.value, out.tangent

    @staticmethod
    def backward(ctx, gradient, _):
        inputs = [v.detach().requires_grad_(v.requires_grad) for v in ctx.saved_tensors]
        with torch.enable_grad(), ctx.randomness.replayed():
            value = ctx.block(*inputs)
        torch.autograd.backward(value, gradient)
        return None, None, *(x.grad for x in inputs)
