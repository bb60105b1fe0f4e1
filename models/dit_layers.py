"""Layers of the transformers. B batch, N tokens, W width, H heads, D numbers per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import ConditionEmbedding, Conditioning, pixel_norm, silenced, unit_modulation

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
        self.modulation, self.eps = silenced(nn.Linear(width, 2 * width)), eps

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=self.eps), 1 + scale)


class Gate(nn.Module):
    """x * alpha(c), zero at first: (B, N, W), (B, W) -> (B, N, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = silenced(nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x * self.alpha(condition)[:, None]


class Branches(nn.Module):
    """The layers of self-attention and an MLP, each behind a normalisation that sees the condition."""

    def __init__(self, options: DiTOptions, execution: Execution, attention_norm: nn.Module, mlp_norm: nn.Module):
        super().__init__()
        width, hidden = options.width, int(options.width * options.mlp_ratio)
        self.heads, self.execution = options.heads, execution
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(options.dropout)

    def attend(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W). A method of its own: its parts are freed before the MLP."""
        B, N, W = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        mixed = attention(self.prepared(q), self.prepared(k), v, self.execution.attention)
        return self.project(mixed.transpose(1, 2).reshape(B, N, W))

    def prepared(self, x: Tensor) -> Tensor:
        """Queries or keys before they meet."""
        return x


class Block(Branches):
    """As sCM needs it: adaptive double normalisations, queries and keys of unit size. Both branches begin silent."""

    attention_norm: AdaptiveDoubleNorm
    mlp_norm: AdaptiveDoubleNorm

    def __init__(self, options: DiTOptions, execution: Execution):
        super().__init__(options, execution, *(AdaptiveDoubleNorm(options.width) for _ in range(2)))
        for branch in (self.project, self.down):
            silenced(branch)

    def prepared(self, x: Tensor) -> Tensor:
        return pixel_norm(x)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x, condition))
        return x + self.down(self.dropout(F.silu(self.up(self.mlp_norm(x, condition)))))


class ZeroBlock(Branches):
    """As published (adaLN-Zero): adaptive layer normalisations, and gates that are closed at first."""

    def __init__(self, options: DiTOptions, execution: Execution):
        width = options.width
        super().__init__(options, execution, AdaptiveLayerNorm(width), AdaptiveLayerNorm(width, options.mlp_eps or EPS))
        self.attention_gate, self.mlp_gate = Gate(width), Gate(width)

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
