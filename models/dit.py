"""A TrigFlow transformer (DiT family, Peebles & Xie 2023) in the form that sCM needs.

Differences from DiT (sCM section 4.1): c_noise(t) = t through a slow positional embedding; adaptive *double*
normalisation, y = pnorm(x) * pnorm(scale) + pnorm(shift), in place of adaLN; queries and keys normalised.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.execution import Execution
from models.layers import ConditionEmbedding, Conditioning, WeightingHead, pixel_norm, unit_modulation
from models.tangent.dual import value_of


@dataclass(frozen=True)
class DiTOptions:
    """Shape of a DiT. Tokens are patch_size x patch_size pixels; width must be a multiple of heads."""

    name: Literal["dit"] = "dit"
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch_size: int = 2
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    time_scale: float = 1.0  # highest frequency of the embedding of time, rad per unit (iCT's "embedding scale")

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch_size", "mlp_ratio"):
            if getattr(self, key) < 1:
                raise ValueError(f"network.{key} must be at least 1")
        if not self.time_scale > 0:
            raise ValueError("network.time_scale must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError("network.dropout must be in [0, 1)")


SHAPES = {  # DiT table 1: width, depth, heads
    "dit-s": (384, 12, 6),
    "dit-b": (768, 12, 12),
    "dit-l": (1024, 24, 16),
    "dit-xl": (1152, 28, 16),
}


@dataclass(frozen=True)
class DiTSize:
    """A published width, depth and number of heads, on patches of 2x2; the blocks are this module's."""

    name: Literal["dit-s", "dit-b", "dit-l", "dit-xl"]
    dropout: float = 0.0
    time_scale: float = 1.0  # highest frequency of the embedding of time, rad per unit

    def __post_init__(self) -> None:
        assert self.free

    @property
    def free(self) -> DiTOptions:
        """The same network by width and depth."""
        width, depth, heads = SHAPES[self.name]
        return DiTOptions("dit", width, depth, heads, dropout=self.dropout, time_scale=self.time_scale)


class AdaptiveDoubleNorm(nn.Module):
    """pnorm(x) * pnorm(scale(c)) + pnorm(shift(c)): (B, N, W), (B, W) -> (B, N, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = unit_modulation(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return torch.addcmul(pixel_norm(shift), pixel_norm(x), pixel_norm(scale))


class Block(nn.Module):
    """Self-attention and an MLP, each behind an adaptive double normalisation and a learned gate."""

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
        B, N, W = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        mixed = attention(pixel_norm(q), pixel_norm(k), v, self.execution.attention)
        return self.project(mixed.transpose(1, 2).reshape(B, N, W))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x, condition))
        return x + self.down(self.dropout(F.silu(self.up(self.mlp_norm(x, condition)))))


class DiT(nn.Module):
    """F(u, t, label) and w(t). `u` is x_t / sigma_data, of unit variance."""

    def __init__(
        self,
        options: DiTOptions,
        channels: int,
        height: int,
        width: int,
        told: Conditioning,
        execution: Execution,
    ):
        super().__init__()
        patch = options.patch_size
        if height % patch or width % patch:
            raise ValueError(f"network.patch_size {patch} does not divide images of {height}x{width}")
        if options.width % (4 * options.heads):
            raise ValueError(f"network.width {options.width} is not a multiple of 4 x network.heads ({options.heads})")
        self.patch, self.grid, self.execution = patch, (height // patch, width // patch), execution
        self.head_dim = options.width // options.heads
        self.embed = nn.Linear(channels * patch * patch, options.width)
        self.condition = ConditionEmbedding(options.width, told, options.time_scale)
        self.blocks = nn.ModuleList(Block(options, execution) for _ in range(options.depth))
        self.norm = AdaptiveDoubleNorm(options.width)
        self.head = nn.Linear(options.width, channels * patch * patch)
        self.weighting = WeightingHead(options.width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        labels: Tensor,
        guidance: Tensor | None = None,
        end: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), 4 x (B,), (B, 9), t in [0, pi/2] -> F (B, C, H, W) and log-weight (B,), in the dtype of `u`.

        The weights' dtype rules inside; what depends on t alone keeps the dtype of `t`.
        """
        dtype = self.head.weight.dtype
        x = self.embed(self.to_tokens(u).to(dtype))
        x = x + grid_embedding(self.grid, x.shape[-1], u.device).to(dtype)
        condition = self.condition(t, labels, guidance, end, augmentation).to(dtype)
        for block in self.blocks:
            x = self.execution.run(block, x, condition)
        value = self.from_tokens(self.head(self.norm(x, condition)))
        return value.to(u.dtype), self.weighting(value_of(t))  # nobody asks for the weight's tangent

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C p p)."""
        B, C, _, _ = x.shape
        (rows, columns), p = self.grid, self.patch
        return x.reshape(B, C, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * p * p)

    def from_tokens(self, x: Tensor) -> Tensor:
        """(B, N, C p p) -> (B, C, H, W)."""
        B = x.shape[0]
        (rows, columns), p = self.grid, self.patch
        return x.reshape(B, rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, -1, rows * p, columns * p)


def grid_embedding(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Fixed two-dimensional sines and cosines of the token's place: (N, W)."""
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)
    rows, columns = (torch.arange(n, device=device)[:, None] * frequencies for n in grid)
    rows = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(-1, grid[1], -1)
    columns = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid[0] * grid[1], width)
