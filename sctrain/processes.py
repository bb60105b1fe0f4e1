"""The TrigFlow process (sCM section 3): x_t = cos t x0 + sin t z with z ~ N(0, sigma_d^2 I), t in [0, pi/2].

Pure functions on tensors of shape (B, C, H, W) with times of shape (B,), and the map between pixels and model space.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# sigma = 80 where sigma_data = 0.5 (EDM's sigma_max): the time at which sampling starts.
T_MAX = 1.5645


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply `like`."""
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def diffuse(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = cos t x0 + sin t z (sCM eq. 4)."""
    t = per_sample(t, x0)
    return t.cos() * x0 + t.sin() * z


def velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = cos t z - sin t x0: the target of diffusion, and the conditional velocity of sCT."""
    t = per_sample(t, x0)
    return t.cos() * z - t.sin() * x0


def sigma_of(t: Tensor, sigma_data: float) -> Tensor:
    """EDM's noise level sigma = sigma_d tan t (Karras et al. 2022, where x = x_t / cos t)."""
    return sigma_data * t.tan()


def sigma_at(time: float, sigma_data: float) -> float:
    """`sigma_of` one time."""
    return sigma_data * math.tan(time)


def time_of(sigma: Tensor, sigma_data: float) -> Tensor:
    """t = arctan(sigma / sigma_d)."""
    return torch.atan(sigma / sigma_data)


def time_at(sigma: float, sigma_data: float) -> float:
    """`time_of` one noise level."""
    return math.atan(sigma / sigma_data)


def noise_estimate(x: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """z = sin t x + cos t sigma_d F: the noise in x, of standard deviation sigma_d."""
    t = per_sample(t, x)
    return t.sin() * x + t.cos() * sigma_data * F


def jump(x: Tensor, F: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """From time t to s along the line of (denoised image, noise): cos(t - s) x - sin(t - s) sigma_d F.

    This is DDIM, Euler's step in EDM's sigma, and CTM's G = (s/t) x + (1 - s/t) g; s = 0 denoises.
    """
    gap = per_sample(t - s, x)
    return gap.cos() * x - gap.sin() * sigma_data * F


def denoise(x: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """The denoised image, and the consistency function f = cos t x - sin t sigma_d F (sCM eq. 6)."""
    t = per_sample(t, x)
    return t.cos() * x - t.sin() * sigma_data * F


@dataclass(frozen=True)
class ModelSpace:
    """Pixels in [0, 1], or latents, to model space: x = (pixel - mean) sigma_data / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    sigma_data: float
    unit: float = 255.0  # what stands for 1 in the data

    def from_pixels(self, images: Tensor) -> Tensor:
        """uint8 images, or latents, (B, C, H, W) -> float32 (B, C, H, W)."""
        mean, std = self._channels(images)
        return (images.float() / self.unit - mean) * (self.sigma_data / std)

    def to_pixels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> uint8 (B, C, H, W), clipped."""
        mean, std = self._channels(x)
        return ((x * (std / self.sigma_data) + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def to_signed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to pixels in [-1, 1], neither rounded nor clipped."""
        mean, std = self._channels(x)
        return 2 * (x * (std / self.sigma_data) + mean) - 1

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=like.device).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std
