"""A TrigFlow transformer (DiT family, Peebles & Xie 2023) in the form that sCM needs, and in the published one.

Differences of the former (sCM section 4.1): c_noise(t) = t through a slow positional embedding; adaptive *double*
normalisation, y = pnorm(x) * pnorm(scale) + pnorm(shift), in place of adaLN-Zero; queries and keys normalised.
"""

from torch import Tensor, nn

from models.dit_layers import AdaptiveDoubleNorm, AdaptiveLayerNorm, Block, ZeroBlock, condition_of, grid_embedding
from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import Conditioning, WeightingHead
from models.tangent.dual import value_of


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
        self.columns_first = options.is_zero  # as DiT's own code has the places of tokens
        self.embed = nn.Linear(channels * patch * patch, options.width)
        self.condition = condition_of(options, told)
        block = ZeroBlock if options.is_zero else Block
        self.blocks = nn.ModuleList(block(options, execution) for _ in range(options.depth))
        self.norm = (AdaptiveLayerNorm if options.is_zero else AdaptiveDoubleNorm)(options.width)
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
        places = grid_embedding(self.grid, x.shape[-1], u.device, columns_first=self.columns_first)
        x = x + places.to(dtype)
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
