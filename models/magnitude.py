"""Magnitude-preserving layers (EDM2: Karras et al. 2024, section 2, appendix B): each keeps the size of its input.

A weight counts by its direction alone: every output channel's is divided by its norm wherever it is used. Its own size
then only sets how far a step of the optimizer turns it; a training run puts the rows of the weights that
`normalized_weights` names back to unit root mean square after each step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from models.layers import Held
from models.tangent.dual import Dual, rule
from models.tangent.precision import factors
from models.tangent.recorded import recording

EPSILON = 1e-4
SILU = 0.596  # root mean square of silu(x) for x ~ N(0, 1)

# --- Weights of unit norm --------------------------------------------------------------------------------------------


def normalized(weight: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """gain W / (|W| + epsilon sqrt(n)) row by row, n numbers in each: at least float32, (O, ...) -> (O, ...)."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide * (gain / _size(wide))


def _size(weight: Tensor) -> Tensor:
    """|W| + epsilon sqrt(n) of every row: (O, ...) -> (O, 1, ...)."""
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norm + EPSILON * math.sqrt(weight[0].numel())


def normalized_product(x: Tensor, weight: Tensor, gain: Tensor | None, scale: float) -> Tensor:
    """x through a linear layer or a convolution of `scale` gain W / |W|, in the dtype of x. No gain is a gain of 1."""
    if has_torch_function_unary(x):
        return handle_torch_function(normalized_product, (x,), x, weight, gain, scale)
    if recording():
        return _product(x, normalized(weight, _times(scale, gain)).to(x.dtype))
    return _NormalizedProduct.apply(x, weight, gain, scale)[0]


def _times(scale: float, gain: Tensor | None) -> Tensor | float:
    return scale if gain is None else scale * gain


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class _NormalizedProduct(torch.autograd.Function):
    """Keeps the parameter for backward and divides it again: autograd alone would keep the quotient, a second copy of
    all weights, which under ZeRO-3 would stay whole on every rank from forward to backward.
    """

    @staticmethod
    def forward(ctx, x, weight, gain, scale):
        used = normalized(weight, _times(scale, gain)).to(x.dtype)
        ctx.save_for_backward(x, weight, gain)
        ctx.scale = scale
        ctx.mark_non_differentiable(used)
        return _product(x, used), used

    @staticmethod
    def backward(ctx, g_out, _):
        x, weight, gain = ctx.saved_tensors
        wanted, factor = ctx.needs_input_grad, _times(ctx.scale, gain)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        size = _size(wide)
        used = (wide * (factor / size)).to(x.dtype)
        g_x, g_used = _product_gradients(g_out, x, used, wanted[0], wanted[1] or wanted[2])
        if g_used is None:
            return g_x, None, None, None
        rows = tuple(range(1, weight.ndim))
        g_used = g_used.to(wide.dtype)
        along = (g_used * wide).sum(rows, keepdim=True) / size  # of g . W / size, row by row
        norm = (size - EPSILON * math.sqrt(weight[0].numel())).clamp_min(torch.finfo(wide.dtype).tiny)
        g_weight = torch.addcmul(g_used, wide, along / norm, value=-1).mul_(factor / size)
        g_gain = None if gain is None else (ctx.scale * along.sum()).to(gain.dtype).view_as(gain)
        return g_x, g_weight.to(weight.dtype), g_gain, None


def _product_gradients(g: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool):
    if weight.ndim == 2:
        g_weight = g.flatten(0, -2).mT @ x.flatten(0, -2) if of_weight else None
        return g @ weight if of_x else None, g_weight
    padding, ones = [weight.shape[-1] // 2] * 2, [1, 1]
    mask = [of_x, of_weight, False]
    return torch.ops.aten.convolution_backward(g, x, weight, None, ones, padding, ones, False, [0, 0], 1, mask)[:2]


@rule("normalized_product")
def _normalized_product(function, args, kwargs):
    x, weight, gain, scale = args
    out, used = _NormalizedProduct.apply(x.value, weight, gain, scale)
    with torch.no_grad():
        return Dual(out, _product(*factors(x.tangent, used)))


class _Normalized(nn.Module):
    """A weight of which only the directions of its rows count, drawn from N(0, 1).

    `scale` is a constant factor, in which a caller may put one of its own for nothing. With `gained` there is also a
    learned one, zero at first.
    """

    def __init__(self, *shape: int, scale: float = 1.0, gained: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.gain = nn.Parameter(torch.zeros(1)) if gained else None
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of x, whatever that of the weight."""
        return normalized_product(x, self.weight, self.gain, self.scale)


class MPLinear(_Normalized):
    """(B, I) -> (B, O), without a bias."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0, *, gained: bool = False):
        super().__init__(outputs, inputs, scale=scale, gained=gained)


class MPConv(_Normalized):
    """(B, I, H, W) -> (B, O, H, W), without a bias; `kernel` is 1 or 3."""

    def __init__(self, inputs: int, outputs: int, kernel: int, scale: float = 1.0, *, gained: bool = False):
        super().__init__(outputs, inputs, kernel, kernel, scale=scale, gained=gained)


def normalized_weights(network: nn.Module) -> list[str]:
    """Names of the parameters whose rows count by their direction alone, in the network's order."""
    return [f"{name}.weight" for name, part in network.named_modules() if isinstance(part, _Normalized)]


# --- Activations of unit size ----------------------------------------------------------------------------------------


def unit_size(x: Tensor, dim: int) -> Tensor:
    """x / (rms(x) + epsilon) over one dimension, without parameters: EDM2's pixel normalisation."""
    if has_torch_function_unary(x):
        return handle_torch_function(unit_size, (x,), x, dim)
    if recording():
        return (x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) / math.sqrt(x.shape[dim]) + EPSILON)).to(
            x.dtype
        )
    return _UnitSize.apply(x, dim)[0]


def _rms(x: Tensor, dim: int) -> Tensor:
    """In float32 at least. On a CPU vector_norm takes 14 times as long over channels."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dim, keepdim=True).sqrt()


class _UnitSize(torch.autograd.Function):
    """Returns y and rms(x). Keeping these two is all that the gradient and the tangent need."""

    @staticmethod
    def forward(ctx, x, dim):
        rms = _rms(x, dim)
        y = (x / (rms + EPSILON)).to(x.dtype)
        ctx.save_for_backward(y, rms)
        ctx.dim = dim
        ctx.mark_non_differentiable(rms)
        return y, rms

    @staticmethod
    def backward(ctx, g_y, _):
        y, rms = ctx.saved_tensors
        return _off_radius(g_y, y, rms, ctx.dim), None


def _off_radius(direction: Tensor, y: Tensor, rms: Tensor, dim: int) -> Tensor:
    """d / (rms + epsilon) - y mean(y d) / rms: through the Jacobian, which is symmetric: gradient and tangent alike."""
    along = (y * direction).mean(dim, keepdim=True) / rms.clamp_min(torch.finfo(rms.dtype).tiny)
    return torch.addcmul(direction / (rms + EPSILON), y, along, value=-1).to(direction.dtype)


@rule("unit_size")
def _unit_size(function, args, kwargs):
    x, dim = args
    y, rms = _UnitSize.apply(x.value, dim)
    with torch.no_grad():
        return Dual(y, _off_radius(x.tangent, y, rms, dim))


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596."""
    return F.silu(x) / SILU


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Channels of a and b, so weighted that they share what follows as 1 - t to t, whatever their numbers."""
    (n_a, n_b), total = (a.shape[1], b.shape[1]), math.sqrt((1 - t) ** 2 + t**2)
    size = math.sqrt(n_a + n_b) / total
    return torch.cat([a * (size * (1 - t) / math.sqrt(n_a)), b * (size * t / math.sqrt(n_b))], dim=1)


def sum_factors(t: float) -> tuple[float, float]:
    """The two factors of a magnitude-preserving sum ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)."""
    total = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / total, t / total


class MPFourier(Held):
    """sqrt(2) cos(2 pi (f x + phase)), frequencies f from N(0, 1), phases from U(0, 1): (B,) -> (B, W), dtype of x."""

    def __init__(self, width: int):
        super().__init__()
        self.frequencies, self.phases = nn.Parameter(torch.randn(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        frequencies, phases = (self.held(p).to(x.dtype) for p in (self.frequencies, self.phases))
        return math.sqrt(2) * (2 * math.pi * (x[:, None] * frequencies + phases)).cos()
