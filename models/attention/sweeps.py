"""Values and tangents of attention in PyTorch: the plain formula, and the same by blocks of rows in memory O(N).

Both return (out, t_out, logsumexp); low precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # queries at once; on a CPU fewer cost time, more memory (docs/performance.md)


def reference(q: Tensor, k: Tensor, v: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula as it stands, every logit at once: 6 x (B, H, N, D)."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v, t_q, t_k, t_v = (_wide(x) for x in (q, k, v, t_q, t_k, t_v))
    scores, t_scores = scale * q @ k.mT, scale * (t_q @ k.mT + q @ t_k.mT)  # (B, H, N, N)
    weights = scores.softmax(-1)
    out, moved = weights @ v, weights * t_scores
    t_out = weights @ t_v + moved @ v - moved.sum(-1, keepdim=True) * out
    return out.to(dtype), t_out.to(dtype), scores.logsumexp(-1)


def blocked(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor, rows: int = ROWS) -> tuple[Tensor, ...]:
    """By blocks of `rows` queries, each against all keys: 6 x (B, H, N, D).

    Without tangents it gives (out, logsumexp): what the tangent costs is measured against that.
    """
    (B, H, N, D), dtype, scale = q.shape, q.dtype, q.shape[-1] ** -0.5
    q, k, v, *moving = (_wide(x).reshape(B * H, N, D) for x in (q, k, v, *tangents))
    both_q, both_k, t_v = q, k, v  # idle without tangents
    if moving:
        t_q, t_k, t_v = moving
        # tS = tQ K' + Q tK' in one product with twice the inner dimension; Q and K are parts of its factors.
        both_q, both_k = torch.cat([t_q, q], -1).mul_(scale), torch.cat([k, t_k], -1).mT
        q, k = both_q[..., D:], both_k[..., :D, :]
    else:
        q, k = q * scale, k.mT
    out = [q.new_empty(B, N, H, D, dtype=dtype).transpose(1, 2) for _ in range(2 if moving else 1)]
    logsumexp = q.new_empty(B, H, N)
    for start in range(0, N, rows):
        block = slice(start, start + rows)
        scores = torch.bmm(q[:, block], k)
        weights = scores.softmax(-1)
        # The largest weight is exp(its score) / sum of exp(scores).
        logsumexp[:, :, block] = (scores.amax(-1) - weights.amax(-1).log()).view(B, H, -1)
        value = torch.bmm(weights, v)
        out[0][:, :, block] = value.view(B, H, -1, D)
        if moving:
            moved = torch.bmm(both_q[:, block], both_k, out=scores).mul_(weights)
            t_value = torch.bmm(weights, t_v).baddbmm_(moved, v)
            t_value.addcmul_(moved.sum(-1, keepdim=True), value, value=-1)
            out[1][:, :, block] = t_value.view(B, H, -1, D)
    return (*out, logsumexp)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
