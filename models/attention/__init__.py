"""Attention that carries tangents, in three implementations behind one function.

With S = scale Q K', P = softmax(S), O = P V the tangent is  tO = P tV + (P * tS) V - rowsum(P * tS) * O  (sCM appendix
F), tS = scale (tQ K' + Q tK'). PyTorch's fused kernels have no such rule. Values without a tangent take them; a value
with a tangent comes out of the same sweep as the tangent, with the softmax's statistics, so that the fused backward
kernel serves it.
"""

from models.attention.choice import BACKENDS, Backend, attention, chosen_backend

__all__ = ["BACKENDS", "Backend", "attention", "chosen_backend"]
