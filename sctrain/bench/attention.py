"""`sctrain bench attention`: values with tangents beside values alone, over lengths, in time and memory.

The baseline of every ratio is the same code without tangents; PyTorch's own kernel, which has none, is timed beside it.
Forward only: the gradient of the value is PyTorch's kernel in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.choice import chosen_backend, implementation
from sctrain.bench.memory import footprint
from sctrain.bench.timing import Step, interleaved

LONGEST_REFERENCE = 2048  # beyond it the plain formula's memory is out of proportion


@dataclass(frozen=True)
class AttentionSettings:
    """B x H heads of each length."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    head_dims: tuple[int, ...] = (64,)
    batch: int = 1
    heads: int = 2
    precision: str = "fp32"
    backends: tuple[str, ...] = ("reference", "blocked")
    rounds: int = 5


@dataclass(frozen=True)
class AttentionRow:
    """One implementation at one length."""

    backend: str
    length: int
    head_dim: int
    seconds: float
    ratio_to_value: float | None  # the same code computing the value alone
    ratio_to_sdpa: float  # PyTorch's kernel for the value
    peak_bytes: int


def measure(settings: AttentionSettings, device: torch.device) -> list[AttentionRow]:
    """All rows, lengths ascending."""
    return [
        row
        for head_dim in settings.head_dims
        for length in settings.lengths
        for backend in settings.backends
        if backend != "reference" or length <= LONGEST_REFERENCE
        for row in [_measure(settings, backend, length, head_dim, device)]
    ]


def default_backends(device: torch.device, precision: str, head_dim: int) -> tuple[str, ...]:
    """The reference, and what is chosen here."""
    return "reference", chosen_backend(device, _dtype(precision), head_dim)


@torch.no_grad()
def _measure(
    settings: AttentionSettings, backend: str, length: int, head_dim: int, device: torch.device
) -> AttentionRow:
    dtype, shape = _dtype(settings.precision), (settings.batch, length, settings.heads, head_dim)
    q, k, v, *tangents = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(6))
    sweep: Callable[..., Sequence[Tensor]] = implementation(backend)
    both = Step(lambda: sweep(q, k, v, *tangents))
    others = {"sdpa": Step(lambda: F.scaled_dot_product_attention(q, k, v))}
    if backend != "reference":
        others["value"] = Step(lambda: sweep(q, k, v))
    base, timed = interleaved(both, others, settings.rounds)
    inverse = {name: 1 / figures.ratio.median for name, figures in timed.items()}
    return AttentionRow(
        backend,
        length,
        head_dim,
        round(base.median, 6),
        round(inverse["value"], 3) if "value" in inverse else None,
        round(inverse["sdpa"], 3),
        footprint(both.run).peak_bytes,
    )


def growth(rows: Sequence[AttentionRow]) -> float:
    """The exponent p of peak memory ~ length^p: the slope of a straight line through their logarithms."""
    xs, ys = [math.log(row.length) for row in rows], [math.log(row.peak_bytes) for row in rows]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def _dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
