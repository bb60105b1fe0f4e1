"""Layers of the transformers. B batch, N tokens, W width, H heads, D numbers per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import ConditionEmbedding, Conditioning, pixel_norm, unit_modulation

_PERIOD = 100.0  # of the embedding of time: its highest frequency over the lowest
_ZERO_EMBEDDED = 256  # numbers of DiT's embedding of time, whatever its width
_ZERO_PERIOD = 10_000.0 ** (127 / 128)  # its 128 frequencies end before 1 / 10,000
EPS = 1e-6  # of layer normalisation


class AdaptiveDoubleNorm(nn.Module):
    """pnorm(x) * pnorm(scale(c)) + pnorm(shift(c)): (B, N, W), (B, W) -> (B, N, W). sCM section 4.1."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = unit_modulation(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return torch.addcmul(pixel_norm(shift), pixel_norm(x), pixel_norm(scale))


class AdaptiveLayerNorm(nn.Module):
    """norm(x) * (1 + scale(c)) + shift(c): (B, N, W), (B, W) -> (B, N, W). DiT section 3.2."""

    def __init__(self, width: int, eps: float = EPS):
        super().__init__()
        self.modulation, self.eps = _silent(width, 2 * width), eps

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=self.eps), 1 + scale)


class Gate(nn.Module):
    """x * alpha(c), zero at first: (B, N, W), (B, W) -> (B, N, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = _silent(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x * self.alpha(condition)[:, None]


class Block(nn.Module):
    """Self-attention and an MLP, each behind an adaptive double normalisation; both are silent at first."""

    def __init__(self, options: DiTOptions, execution: Execution):
        super().__init__()
        width, hidden = options.width, int(options.width * options.mlp_ratio)
        self.heads, self.execution = options.heads, execution
        self.attention_norm, self.mlp_norm = AdaptiveDoubleNorm(width), AdaptiveDoubleNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(options.dropout)
        for branch in (self.project, self.down):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = _heads_apart(self.qkv(x), self.heads)
        return self.project(_heads_joined(attention(pixel_norm(q), pixel_norm(k), v, self.execution.attention)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x, condition))  # whose parts are freed before the MLP
        return x + self.down(self.dropout(F.silu(self.up(self.mlp_norm(x, condition)))))


class ZeroBlock(nn.Module):
    """As published: both behind an adaptive layer normalisation and a gate, which is closed at first (adaLN-Zero)."""

    def __init__(self, options: DiTOptions, execution: Execution):
        super().__init__()
        width, hidden = options.width, int(options.width * options.mlp_ratio)
        self.heads, self.execution = options.heads, execution
        self.attention_norm, self.mlp_norm = AdaptiveLayerNorm(width), AdaptiveLayerNorm(width, options.mlp_eps or EPS)
        self.attention_gate, self.mlp_gate = Gate(width), Gate(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(options.dropout)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = _heads_apart(self.qkv(x), self.heads)
        return self.project(_heads_joined(attention(q, k, v, self.execution.attention)))

    def transform(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x), approximate="tanh")))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attention_gate(self.attend(self.attention_norm(x, condition)), condition)
        return x + self.mlp_gate(self.transform(self.mlp_norm(x, condition)), condition)


def condition_of(options: DiTOptions, told: Conditioning) -> ConditionEmbedding:
    """What all blocks are told, as the form has it."""
    period = options.time_period or (_ZERO_PERIOD if options.is_zero else _PERIOD)
    embedded = _ZERO_EMBEDDED if options.is_zero else options.width
    return ConditionEmbedding(options.width, told, options.time_scale, period, embedded)


def grid_embedding(grid: tuple[int, int], width: int, device: torch.device, *, columns_first: bool = False) -> Tensor:
    """Fixed two-dimensional sines and cosines of the token's place, of its row and its column: (N, W)."""
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)
    rows, columns = (torch.arange(n, device=device)[:, None] * frequencies for n in grid)
    rows = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(-1, grid[1], -1)
    columns = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(grid[0], -1, -1)
    halves = [columns, rows] if columns_first else [rows, columns]
    return torch.cat(halves, -1).reshape(grid[0] * grid[1], width)


def _heads_apart(qkv: Tensor, heads: int) -> Tensor:
    """(B, N, 3 W) -> queries, keys and values (3, B, H, N, D)."""
    B, N, W = qkv.shape
    return qkv.reshape(B, N, 3, heads, W // heads // 3).permute(2, 0, 3, 1, 4)


def _heads_joined(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, W)."""
    return x.transpose(1, 2).flatten(2)


def _silent(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
