"""The sweep as a Triton kernel: one pass over the keys gives values, tangents and log sum exp, in O(N) memory.

The recurrence is that of flash attention (Dao 2023, algorithm 1) with two more accumulators (sCM appendix F): for each
block of keys, with weights W = exp(S - m) and m the largest logit so far,

    l += sum W,   O += W V,   A += W tV + (W * tS) V,   rho += sum W * tS,        all rescaled whenever m grows;

at the end O / l is the value and (A - rho * O / l) / l its tangent. Inputs in bfloat16, float16 or float32 are
accumulated in float32. On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

# What only `if TANGENT` knows is compiled only then.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sweep(
    q, k, v, t_q, t_k, t_v, out, t_out, logsumexp,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_tqb, stride_tqh, stride_tqn, stride_tkb, stride_tkh, stride_tkn, stride_tvb, stride_tvh, stride_tvn,
    stride_ob, stride_oh, stride_on, heads, length, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRODUCT: tl.constexpr,
    TANGENT: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_Q queries of one head against all keys. The last dimension of every tensor is dense."""
    first, sample, head = tl.program_id(0) * BLOCK_Q, tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, keys, dims = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    sample, head = sample.to(tl.int64), head.to(tl.int64)
    is_row, is_dim = rows[:, None] < length, dims[None, :] < DIM

    q += sample * stride_qb + head * stride_qh + rows[:, None] * stride_qn + dims[None, :]
    k += sample * stride_kb + head * stride_kh + keys[:, None] * stride_kn + dims[None, :]
    v += sample * stride_vb + head * stride_vh + keys[:, None] * stride_vn + dims[None, :]
    Q = tl.load(q, is_row & is_dim, 0.0)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)  # m, in powers of two
    total = tl.zeros((BLOCK_Q,), tl.float32)
    O = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)  # noqa: E741
    if TANGENT:
        t_q += sample * stride_tqb + head * stride_tqh + rows[:, None] * stride_tqn + dims[None, :]
        t_k += sample * stride_tkb + head * stride_tkh + keys[:, None] * stride_tkn + dims[None, :]
        t_v += sample * stride_tvb + head * stride_tvh + keys[:, None] * stride_tvn + dims[None, :]
        tQ = tl.load(t_q, is_row & is_dim, 0.0)
        rho, A = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    for start in range(0, length, BLOCK_K):
        is_key = (start + keys) < length
        mask = is_key[:, None] & is_dim
        # The order of these lines decides how many registers are needed at once; a test asks the compiler.
        K, V = tl.load(k + start * stride_kn, mask, 0.0), tl.load(v + start * stride_vn, mask, 0.0)
        if TANGENT:
            tK, tV = tl.load(t_k + start * stride_tkn, mask, 0.0), tl.load(t_v + start * stride_tvn, mask, 0.0)
        S = tl.dot(Q, tl.trans(K), input_precision=PRODUCT) * (scale * LOG2_E)
        S = tl.where(is_key[None, :], S, float("-inf"))
        if TANGENT:
            tS = tl.dot(tQ, tl.trans(K), input_precision=PRODUCT)
            tS = tl.dot(Q, tl.trans(tK), tS, input_precision=PRODUCT) * scale
        before, largest = largest, tl.maximum(largest, tl.max(S, 1))
        W, keep = tl.exp2(S - largest[:, None]), tl.exp2(before - largest)
        total = total * keep + tl.sum(W, 1)
        if TANGENT:
            moved = W * tS
            rho = rho * keep + tl.sum(moved, 1)
            moved = moved.to(V.dtype)
        W = W.to(V.dtype)
        O = tl.dot(W, V, O * keep[:, None], input_precision=PRODUCT)  # noqa: E741
        if TANGENT:
            A = tl.dot(W, tV, A * keep[:, None], input_precision=PRODUCT)
            A = tl.dot(moved, V, A, input_precision=PRODUCT)

    O = O / total[:, None]  # noqa: E741
    place = sample * stride_ob + head * stride_oh + rows[:, None] * stride_on + dims[None, :]
    tl.store(out + place, O.to(out.dtype.element_ty), is_row & is_dim)
    tl.store(logsumexp + tl.program_id(1).to(tl.int64) * length + rows, largest / LOG2_E + tl.log(total), rows < length)
    if TANGENT:
        tO = (A - rho[:, None] * O) / total[:, None]
        tl.store(t_out + place, tO.to(t_out.dtype.element_ty), is_row & is_dim)


def triton_sweep(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor) -> tuple[Tensor, ...]:
    """6 x (B, H, N, D) of one dtype, D from 16 to 256 -> out, t_out (B, H, N, D), logsumexp (B, H, N) in float32.

    Without tangents it gives (out, logsumexp): what the tangent costs is measured against that.
    """
    (B, H, N, D), given = q.shape, (q, k, v, *(tangents or (q, k, v)))
    operands = [x if x.stride(-1) == 1 else x.contiguous() for x in given]
    out = [q.new_empty(B, N, H, D).transpose(1, 2) for _ in range(2 if tangents else 1)]  # as linear layers take it
    logsumexp = q.new_empty(B, H, N, dtype=torch.float32)
    strides = [stride for x in operands for stride in x.stride()[:3]] + list(out[0].stride()[:3])
    constants, launch = compile_options(D, q.dtype, tangent=bool(tangents))
    launched = _sweep[triton.cdiv(N, constants["BLOCK_Q"]), B * H]
    launched(*operands, out[0], out[-1], logsumexp, *strides, H, N, D**-0.5, **constants, **launch)  # pyright: ignore
    return (*out, logsumexp)


def compile_options(dim: int, dtype: torch.dtype, *, tangent: bool = True) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants of the kernel, and how it is launched.

    The largest blocks whose registers do not spill on A100 and H100, as the compiler reports (a test asks it): six
    operands and two accumulators have to fit. Float32 spills above 64 dimensions whatever the blocks.
    """
    if dtype == torch.float32:
        block_q, block_k, warps, stages = (32, 32, 8, 2) if dim <= 64 else (16, 16, 4, 1)
        product = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"  # the latter is as good as float32
    else:
        block_q, block_k, warps, stages = next(tiles for largest, tiles in _TILES.items() if dim <= largest)
        product = "ieee"
    block_d = triton.next_power_of_2(dim)
    constants = {"DIM": dim, "BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_K": block_k, "PRODUCT": product}
    constants["TANGENT"] = tangent
    return constants, {"num_warps": warps, "num_stages": stages}


# Head dimensions up to this one: queries and keys per block, warps, stages.
_TILES = {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)}
