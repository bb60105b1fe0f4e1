"""Gaussian data N(m, diag(s^2)): velocity, flow and consistency function in closed form (TrigFlow variables)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sctrain.processes import per_sample


@dataclass(frozen=True)
class Gaussian:
    """Anisotropic, off-centre, and of another width than sigma_data: nothing here is zero by accident."""

    mean: Tensor  # (C, H, W)
    std: Tensor  # (C, H, W)
    sigma_data: float

    @classmethod
    def example(cls, sigma_data: float) -> "Gaussian":
        g = torch.Generator().manual_seed(7)
        mean = torch.randn(1, 2, 3, generator=g, dtype=torch.float64)
        return cls(mean, 0.3 + torch.rand(1, 2, 3, generator=g, dtype=torch.float64), sigma_data)

    def variance(self, t: Tensor) -> Tensor:
        return t.cos() ** 2 * self.std**2 + t.sin() ** 2 * self.sigma_data**2

    def teacher(self, u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """F with sigma_d F = E[dx_t/dt | x_t]."""
        x, t4 = self.sigma_data * u, per_sample(t, u)
        slope = t4.sin() * t4.cos() * (self.sigma_data**2 - self.std**2) / self.variance(t4)
        velocity = -t4.sin() * self.mean + (x - t4.cos() * self.mean) * slope
        return velocity / self.sigma_data, torch.zeros_like(t)

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x from time t to time s."""
        t4, s4 = per_sample(t, x), per_sample(s, x)
        return s4.cos() * self.mean + (x - t4.cos() * self.mean) * (self.variance(s4) / self.variance(t4)).sqrt()

    def flow_to_data(self, x: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x at time t: the consistency function."""
        t4 = per_sample(t, x)
        return self.mean + self.std * (x - t4.cos() * self.mean) / self.variance(t4).sqrt()

    def student(self, u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """F whose f = cos t x - sin t sigma_d F is the consistency function."""
        x, t4 = self.sigma_data * u, per_sample(t, u)
        F = (t4.cos() * x - self.flow_to_data(x, t)) / (t4.sin() * self.sigma_data)
        return F, torch.zeros_like(t)

    def jumper(self, u: Tensor, t: Tensor, labels: Tensor, guidance: None, end: Tensor) -> tuple[Tensor, Tensor]:
        """F whose jump to `end` is the flow; the teacher's where that is t."""
        x, gap = self.sigma_data * u, per_sample(t - end, u)
        F = (gap.cos() * x - self.flow(x, t, end)) / (gap.sin() * self.sigma_data)
        return torch.where(gap == 0, self.teacher(u, t, labels)[0], F), torch.zeros_like(t)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, *self.mean.shape, generator=generator, dtype=torch.float64)
        return self.mean + self.std * noise
