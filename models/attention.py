"""Attention that carries tangents: the stock kernel for the value, the product rule of the softmax for the tangent.

With S = scale Q K', P = softmax(S), O = P V:  tO = P tV + (P * tS) V - rowsum(P * tS) * O  (sCM appendix F).
"""

import torch.nn.functional as F
from torch import Tensor

from models.tangent import carried


def _attention_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _attention_rule(out, primals, tangents):
    (q, k, v), (t_q, t_k, t_v) = primals, tangents
    scale = q.shape[-1] ** -0.5
    weights = (scale * q @ k.transpose(-1, -2)).softmax(-1)  # (B, H, N, N)
    t_scores = scale * (t_q @ k.transpose(-1, -2) + q @ t_k.transpose(-1, -2))
    moved = weights * t_scores
    return weights @ t_v + moved @ v - moved.sum(-1, keepdim=True) * out


# (B, H, N, D) x 3 -> (B, H, N, D); all three operands carry tangents, or none does.
attention = carried(_attention_value, _attention_rule)
