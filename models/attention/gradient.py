"""The gradient of attention's value from what its forward left: PyTorch's fused backward kernels, or blocks of rows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_aten = torch.ops.aten
ROWS = 128
HALF = (torch.float16, torch.bfloat16)


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether this is a GPU that flash attention and the Triton kernel run on: NVIDIA's from A100 on, AMD's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def value_gradient(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: 5 x (B, H, N, D), logsumexp (B, H, N)."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, out, logsumexp, 0.0, False)
    if q.dtype in HALF and q.shape[-1] % 8 == 0 and has_tensor_cores(q.device):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        lengths = (None, None, q.shape[-2], k.shape[-2])
        return _aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, logsumexp, *lengths, 0.0, False, seed, seed
        )
    return _blocked_gradient(gradient, q, k, v, out, logsumexp)


def _blocked_gradient(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In memory O(N): the weights of a block of rows are made again from their log sum exp (Dao 2022, algorithm 4)."""
    shape, dtype, scale = q.shape, q.dtype, q.shape[-1] ** -0.5
    wide = torch.promote_types(dtype, torch.float32)
    gradient, q, k, v, out = (x.to(wide).reshape(-1, *x.shape[-2:]) for x in (gradient, q, k, v, out))
    logsumexp = logsumexp.reshape(*q.shape[:2], 1)
    g_q, g_k, g_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[1], ROWS):
        block = slice(start, start + ROWS)
        weights = torch.bmm(scale * q[:, block], k.mT).sub_(logsumexp[:, block]).exp_()
        inner = (gradient[:, block] * out[:, block]).sum(-1, keepdim=True)
        g_scores = torch.bmm(gradient[:, block], v.mT).sub_(inner).mul_(weights).mul_(scale)
        g_q[:, block] = torch.bmm(g_scores, k)
        g_k.baddbmm_(g_scores.mT, q[:, block])
        g_v.baddbmm_(weights.mT, gradient[:, block])
    return g_q.view(shape).to(dtype), g_k.view(shape).to(dtype), g_v.view(shape).to(dtype)
