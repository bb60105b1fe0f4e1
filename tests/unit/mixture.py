"""A mixture of Gaussians in the plane, as images of two channels and one pixel: closed score, integrated flow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sctrain.processes import T_MAX


@dataclass(frozen=True)
class Mixture:
    """Neither centred nor isotropic nor of the width sigma_data; no affine map takes noise to it."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, 2)
    stds: Tensor  # (K, 2)
    sigma_data: float

    @classmethod
    def example(cls, dtype: torch.dtype = torch.float64) -> "Mixture":
        weights = torch.tensor([0.76, 0.08, 0.08, 0.08], dtype=dtype)
        means = torch.tensor([[0.0, 0.1], [-1.3, -0.2], [0.6, 1.2], [0.8, -1.1]], dtype=dtype)
        stds = torch.tensor([[0.14, 0.11], [0.10, 0.14], [0.12, 0.10], [0.10, 0.12]], dtype=dtype)
        return cls(weights, means, stds, 0.5)

    @property
    def variance(self) -> float:
        """Of the data, averaged over both coordinates: the unit of errors."""
        mean = self.weights @ self.means
        return (self.weights @ (self.stds**2 + (self.means - mean) ** 2)).mean().item()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2, 1, 1)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=self.means.dtype)
        return (self.means[which] + self.stds[which] * noise)[..., None, None]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[dx_t/dt | x_t] for x (B, 2, 1, 1) and t (B,): the mean over components, by their responsibilities."""
        x, t = x.flatten(1)[:, None], t[:, None, None]  # (B, 1, 2), (B, 1, 1)
        cos, sin = t.cos(), t.sin()
        variance = (cos * self.stds) ** 2 + (sin * self.sigma_data) ** 2  # (B, K, 2)
        off = x - cos * self.means
        logits = self.weights.log() - 0.5 * (off**2 / variance + variance.log()).sum(-1)
        each = -sin * self.means + off * sin * cos * (self.sigma_data**2 - self.stds**2) / variance
        return torch.einsum("bk,bkd->bd", logits.softmax(1), each)[..., None, None]

    def teacher(self, u: Tensor, t: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """F of the perfect diffusion model."""
        return self.velocity(self.sigma_data * u, t) / self.sigma_data, torch.zeros_like(t)

    def flow_to_data(self, noise: Tensor, start: float = T_MAX, steps: int = 500) -> Tensor:
        """Where the probability-flow ODE takes x at `start`: Runge-Kutta of order 4, steps even in the angle."""
        x, h = noise.to(self.means), -start / steps
        for i in range(steps):
            t = torch.full((len(x),), start + i * h, dtype=x.dtype)
            k1 = self.velocity(x, t)
            k2 = self.velocity(x + 0.5 * h * k1, t + 0.5 * h)
            k3 = self.velocity(x + 0.5 * h * k2, t + 0.5 * h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.velocity(x + h * k3, t + h))
        return x


def affine_residual(noise: Tensor, truth: Tensor) -> float:
    """Mean squared error of the best affine map from noise to truth, per coordinate."""
    inputs = torch.cat([noise.flatten(1).to(truth), torch.ones(len(noise), 1, dtype=truth.dtype)], 1)
    outputs = truth.flatten(1)
    return (outputs - inputs @ torch.linalg.lstsq(inputs, outputs).solution).square().mean().item()
