"""`attention`: which implementation, and how its results enter the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from models.attention.gradient import HALF, has_tensor_cores, value_gradient
from models.attention.sweeps import blocked, reference
from models.tangent.dual import Dual, rule
from models.tangent.precision import factors, tangent_dtype

Backend = Literal["auto", "reference", "blocked", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
HEAD_DIMS = range(16, 257)  # that the Triton kernel takes


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """softmax(q k' / sqrt(D)) v, every head alone: 3 x (B, H, N, D) -> (B, H, N, D).

    `backend` is how values with tangents are computed; plain tensors take PyTorch's own kernels.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attention, (q, k, v), q, k, v, backend)
    return F.scaled_dot_product_attention(q, k, v)


@cache
def chosen_backend(device: torch.device, dtype: torch.dtype, head_dim: int, backend: Backend = "auto") -> str:
    """The implementation that `backend` means for tangents of this dtype on this device."""
    if backend != "auto":
        return backend
    # Above 64 dimensions float32 does not fit in a GPU's registers: blocks and cuBLAS are faster.
    suits = head_dim in HEAD_DIMS and (dtype in HALF or (dtype == torch.float32 and head_dim <= 64))
    return "triton" if suits and has_tensor_cores(device) and find_spec("triton") is not None else "blocked"


def implementation(name: str) -> Callable[..., tuple[Tensor, ...]]:
    if name == "triton":
        from models.attention.kernel import triton_sweep  # needs Triton, which there is on Linux with a GPU only

        return triton_sweep
    return {"reference": reference, "blocked": blocked}[name]


@rule("attention")
def _attention(function: Callable, args: tuple, kwargs: dict) -> Dual:
    """Value and tangent of q, k, v, of which at least one is a Dual."""
    q, k, v, *rest = args
    values, tangents = zip(*map(_parts, (q, k, v)), strict=True)
    backend = chosen_backend(q.device, tangents[0].dtype, q.shape[-1], *rest, **kwargs)
    return Dual(*_WithTangent.apply(*values, *tangents, implementation(backend)))


@rule("scaled_dot_product_attention")
def _stock_signature(function: Callable, args: tuple, kwargs: dict) -> Dual:
    """PyTorch's own function, as far as `attention` goes."""
    options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)), **kwargs}
    if any(value for value in options.values() if value is not None):
        raise NotImplementedError(f"attention with tangents takes no {' or '.join(options)}")
    return _attention(function, args[:3], {})


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(x, Dual):
        return x.value, x.tangent
    return x, torch.zeros_like(x, dtype=tangent_dtype(x.dtype))


class _WithTangent(torch.autograd.Function):
    """The tangent is computed beside the value, and only the value has a gradient."""

    @staticmethod
    def forward(ctx, q, k, v, t_q, t_k, t_v, sweep):
        with torch.autocast(q.device.type, enabled=False):
            out, t_out, logsumexp = sweep(*factors(t_q, q, k, v)[1:], t_q, t_k, t_v)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.mark_non_differentiable(t_out)
        return out, t_out

    @staticmethod
    def backward(ctx, gradient, _):
        return (*value_gradient(gradient, *ctx.saved_tensors), None, None, None, None)
