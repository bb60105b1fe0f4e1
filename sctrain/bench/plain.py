"""Networks once more as plain PyTorch, with nothing of ours: what our forwards and diffusion steps are held against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dit import DiT
from models.dit_layers import Block, grid_embedding
from models.edm2 import EDM2
from sctrain.bench.plain_edm2 import plain_edm2
from sctrain.bench.timing import Step


def plain_forward(network: DiT | EDM2, u: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """F with the network's own weights: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
    return plain_edm2(network, u, t, labels) if isinstance(network, EDM2) else _plain_dit(network, u, t, labels)


def _plain_dit(network: DiT, u: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def double_norm(x: Tensor, modulation: nn.Linear) -> Tensor:
        scale, shift = modulation(c)[:, None].chunk(2, dim=-1)
        return norm(x) * norm(scale) + norm(shift)

    x = network.embed(network.to_tokens(u))
    B, N, W = x.shape
    x = x + grid_embedding(network.grid, W, u.device)
    half, condition = W // 2, network.condition
    angles = t[:, None] * torch.exp(-math.log(100.0) * torch.arange(half, device=t.device) / (half - 1))
    c = condition.hidden(math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], -1))
    c = F.silu(condition.out(F.silu(c)) + condition.label(labels))
    for block in network.blocks:
        assert isinstance(block, Block)
        qkv = block.qkv(double_norm(x, block.attention_norm.modulation)).reshape(B, N, 3, block.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(norm(q), norm(k), v).transpose(1, 2).reshape(B, N, W)
        x = x + block.project(mixed)
        x = x + block.down(F.silu(block.up(double_norm(x, block.mlp_norm.modulation))))
    return network.from_tokens(network.head(double_norm(x, network.norm.modulation)))


def plain_step(network: DiT | EDM2, u: Tensor, t: Tensor, labels: Tensor, target: Tensor) -> None:
    """Gradients of the mean squared error."""
    network.zero_grad(set_to_none=True)
    F.mse_loss(plain_forward(network, u, t, labels), target).backward()


def plain_steps(network: DiT | EDM2, u: Tensor, t: Tensor, labels: Tensor, target: Tensor) -> tuple[Step, Step]:
    """The forward and the step, once they are known to compute what the network does."""
    forward = torch.no_grad()(lambda: plain_forward(network, u, t, labels))
    with torch.no_grad():
        torch.testing.assert_close(forward(), network(u, t, labels)[0], rtol=1e-3, atol=1e-4)
    return Step(forward), Step(lambda: plain_step(network, u, t, labels, target))
