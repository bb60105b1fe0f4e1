"""Layers that the project's networks share. B batch, N tokens, W width."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from models.tangent.dual import Dual, rule
from models.tangent.recorded import recording
from models.unet_plan import Resampling

_EPS = 1e-6


def pixel_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without parameters: the `pnorm` of sCM section 4.1."""
    if has_torch_function_unary(x):
        return handle_torch_function(pixel_norm, (x,), x)
    if recording():
        return _plain_pixel_norm(x)
    return _PixelNorm.apply(x)[0]


def _plain_pixel_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt()).to(x.dtype)


class _PixelNorm(torch.autograd.Function):
    """Returns y and 1 / rms(x). Keeping these two is all that the gradient and the tangent need."""

    @staticmethod
    def forward(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square().div(x.shape[-1])
        inverse_rms = (square + _EPS).rsqrt()
        return (x * inverse_rms).to(x.dtype), inverse_rms

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx, g_y, _):
        return _off_radius(g_y, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, t_x):
        return _off_radius(t_x, *ctx.saved_tensors), None


def _off_radius(direction: Tensor, y: Tensor, inverse_rms: Tensor) -> Tensor:
    """(d - y mean(y d)) / rms: d through the Jacobian of pixel_norm, which is symmetric: gradient and tangent alike."""
    along = (y * direction).mean(-1, keepdim=True)
    return torch.addcmul(direction, y, along, value=-1) * inverse_rms


@rule("pixel_norm")
def _pixel_norm(function, args, kwargs):
    x = args[0]
    y, inverse_rms = _PixelNorm.apply(x.value)
    with torch.no_grad():
        return Dual(y, _off_radius(x.tangent, y, inverse_rms))


def unit_modulation(width: int, outputs: int) -> nn.Linear:
    """Makes scale and shift of an adaptive double normalisation, pnorm(scale) and pnorm(shift): (B, W) -> (B, 2 O).

    At first they are of unit size: pnorm of a small vector would magnify its change with t.
    """
    layer = nn.Linear(width, 2 * outputs)
    nn.init.normal_(layer.weight, std=0.02)
    with torch.no_grad():
        layer.bias.copy_(torch.cat([torch.ones(outputs), torch.randn(outputs)]))
    return layer


class PositionalEmbedding(nn.Module):
    """Sines and cosines of t, at `scale` down to scale/period rad per unit of t: (B,) -> (B, W), dtype of t.

    Slow on purpose: high frequencies make dF/dt large and noisy (sCM section 4.1).
    """

    def __init__(self, width: int, period: float = 100.0, scale: float = 1.0):
        super().__init__()
        assert width % 2 == 0, "sines and cosines come in pairs"
        self.width, self.period, self.scale = width, period, scale

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        exponents = torch.arange(half, device=t.device, dtype=t.dtype) / max(half - 1, 1)
        angles = t[:, None] * (self.scale * torch.exp(-math.log(self.period) * exponents))
        return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=-1)


def resampled(x: Tensor, how: Resampling) -> Tensor:
    """Every 2 x 2 pixels averaged, or every pixel four times."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


class Held(nn.Module):
    """A layer whose own parameters no gradient moves: random numbers that whatever keeps weights must keep."""

    @staticmethod
    def held(parameter: Tensor) -> Tensor:
        """The same values with a gradient of zero; engines and optimizers wait for one."""
        return parameter.detach() + 0 * parameter


def held_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters that stay what they are."""
    layers = [(name, part) for name, part in network.named_modules() if isinstance(part, Held)]
    return {f"{name}.{own}" for name, part in layers for own, _ in part.named_parameters(recurse=False)}


class WideLinear(nn.Linear):
    """Computes in its input's dtype, whatever that of the weights: what depends on t alone stays in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


@dataclass(frozen=True)
class Conditioning:
    """What a network is told beside the time. Label `num_classes` means "no class".

    guided: the scale of classifier-free guidance (sCM section 5). jumps: the time at which its jump ends (CTM).
    augmented: EDM's nine numbers that describe how the image was transformed. At first a network ignores these, so it
    can start from the weights of one that is not told them.
    """

    num_classes: int
    guided: bool = False
    jumps: bool = False
    augmented: bool = False


AUGMENTATION_LABELS = 9


class ToldBeside(nn.Module):
    """What of `told` joins an embedding of the time of `width` numbers. Silent at first."""

    guidance: nn.Module | None
    end: nn.Module | None
    augmentation: nn.Module | None

    def silent_layers(self, width: int, told: Conditioning) -> None:
        """Makes the layers."""
        self.guidance = _silent(width, width) if told.guided else None
        self.end = _silent(width, width) if told.jumps else None
        # Without a bias, so that nine zeros say what nothing says: the image is as it was.
        self.augmentation = _silent(AUGMENTATION_LABELS, width, bias=False) if told.augmented else None

    def joined(
        self,
        total: Tensor,
        embed: nn.Module,
        guidance: Tensor | None,
        end: Tensor | None,
        augmentation: Tensor | None,
    ) -> Tensor:
        """(B, W), 2 x (B,), (B, 9) -> (B, W); `embed` makes W numbers of one, such as a scale of guidance."""
        assert (guidance is None) == (self.guidance is None), "a guided network, and no other, is told a scale"
        assert (end is None) == (self.end is None), "a network that jumps, and no other, is told where to"
        if self.guidance is not None and guidance is not None:
            total = total + self.guidance(embed(guidance.to(total.dtype)))
        if self.end is not None and end is not None:
            total = total + self.end(embed(end.to(total.dtype)))
        assert augmentation is None or self.augmentation is not None, "this network is not told of augmentation"
        if self.augmentation is not None and augmentation is not None:  # none when drawing
            total = total + self.augmentation(augmentation.to(total.dtype))
        return total


class ConditionEmbedding(ToldBeside):
    """Time, class and the rest of `told` to one vector per sample, in the dtype of t: (B,), (B,), ... -> (B, W)."""

    def __init__(self, width: int, told: Conditioning, time_scale: float, period: float, embedded: int):
        """`embedded`: how many sines and cosines of the time there are."""
        super().__init__()
        self.time = PositionalEmbedding(embedded, period, time_scale)
        self.beside = PositionalEmbedding(width, scale=time_scale)
        self.hidden = WideLinear(embedded, width)
        self.out = WideLinear(width, width)
        self.label = nn.Embedding(told.num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.5)
        self.silent_layers(width, told)

    def forward(
        self, t: Tensor, labels: Tensor, guidance: Tensor | None, end: Tensor | None, augmentation: Tensor | None
    ) -> Tensor:
        total = self.out(F.silu(self.hidden(self.time(t)))) + self.label(labels)
        return F.silu(self.joined(total, self.beside, guidance, end, augmentation))


def silenced(layer: nn.Linear) -> nn.Linear:
    """The layer with zeros for weights: it says nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _silent(inputs: int, width: int, bias: bool = True) -> nn.Linear:
    return silenced(WideLinear(inputs, width, bias))


class WeightingHead(nn.Module):
    """w(t) of the adaptive weighting e^w L - w (sCM section 4.2), zero at first: (B,) -> (B,), in the dtype of t."""

    def __init__(self, width: int):
        super().__init__()
        self.time = PositionalEmbedding(width)
        self.out = WideLinear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.time(t)).squeeze(-1)
