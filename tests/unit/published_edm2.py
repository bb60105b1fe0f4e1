"""EDM2's U-Net once more, as plain functions of weights by their published names; the weights are made on the way.

Written from the paper's equations (Karras et al. 2024, appendix B), with nothing of the project's.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def sized(x: Tensor, *dims: int) -> Tensor:
    """Divided by the root mean square over some dimensions."""
    return x / (1e-4 + x.square().mean(dims, keepdim=True).sqrt())


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


@dataclass
class PublishedEDM2:
    channels: int = 8
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (4,)
    head_channels: int = 4
    labels: int = 3
    image: int = 4
    scm: bool = False  # as edm2_sCM has it: told t by sines and cosines, scale and shift of unit size
    weights: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.randn(shape, dtype=torch.float64)
        return self.weights[name]

    def linear(self, x: Tensor, name: str, outputs: int, kernel: int = 1) -> Tensor:
        shape = (outputs, x.shape[1]) + (kernel, kernel) * (x.ndim == 4)
        weight = self.weight(f"{name}.weight", *shape)
        used = sized(weight, *range(1, weight.ndim)) / math.sqrt(weight[0].numel())
        return x @ used.T if x.ndim == 2 else F.conv2d(x, used, padding=kernel // 2)

    def fourier(self, x: Tensor, name: str, width: int) -> Tensor:
        if self.scm:
            self.weights[f"{name.replace('fourier', 'pos')}.freqs"] = 1e-4 ** torch.linspace(0, 1, width // 2).double()
            angles = x[:, None] * self.weights[f"{name.replace('fourier', 'pos')}.freqs"]
            return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)
        frequencies, phases = (self.weight(f"{name}.{part}", width) for part in ("freqs", "phases"))
        return math.sqrt(2) * (x[:, None] * frequencies + phases).cos()

    def block(self, x: Tensor, emb: Tensor, name: str, outputs: int, how: str = "", attends: bool = False) -> Tensor:
        encodes = name.startswith("unet.enc")
        if how == "down":
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        elif how == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skips = x.shape[1] != outputs
        if encodes:
            x = sized(self.linear(x, f"{name}.conv_skip", outputs) if skips else x, 1)
        y = self.linear(mp_silu(x), f"{name}.conv_res0", outputs, 3)
        if self.scm:
            told = self.linear(emb, f"{name}.emb_linear", 2 * outputs)[:, :, None, None].chunk(2, dim=1)
            scale, shift = (sized(part, 1) for part in told)
            y = sized(y, 1) * scale + shift
        else:
            told = self.linear(emb, f"{name}.emb_linear", outputs) * self.weight(f"{name}.emb_gain") + 1
            y = y * told[:, :, None, None]
        y = self.linear(mp_silu(y), f"{name}.conv_res1", outputs, 3)
        if not encodes and skips:
            x = self.linear(x, f"{name}.conv_skip", outputs)
        x = mp_sum(x, y, 0.3)
        if attends:
            B, C, H, W = x.shape
            heads = C // self.head_channels
            qkv = sized(self.linear(x, f"{name}.attn_qkv", 3 * C).reshape(B, heads, C // heads, 3, H * W), 2)
            q, k, v = qkv.unbind(3)
            shares = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(C // heads), dim=-1)
            mixed = torch.einsum("bhqk,bhck->bhcq", shares, v).reshape(B, C, H, W)
            x = mp_sum(x, self.linear(mixed, f"{name}.attn_proj", C), 0.3)
        return x.clamp(-256, 256)

    def F(self, x: Tensor, c_noise: Tensor, one_hot: Tensor) -> Tensor:
        """What is added to c_skip x as c_out F."""
        side, width, last = x.shape[-1], self.channels * max(self.multipliers), len(self.multipliers) - 1
        emb = self.linear(self.fourier(c_noise, "unet.emb_fourier", self.channels), "unet.emb_noise", width)
        if self.labels:
            emb = mp_sum(emb, self.linear(one_hot * math.sqrt(self.labels), "unet.emb_label", width), 0.5)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.linear(x, f"unet.enc.{side}x{side}_conv", self.channels, 3)
        left = [x]
        for level, multiplier in enumerate(self.multipliers):
            r = side >> level
            if level:
                x = self.block(x, emb, f"unet.enc.{r}x{r}_down", x.shape[1], "down")
                left.append(x)
            for number in range(self.blocks):
                outputs = self.channels * multiplier
                x = self.block(x, emb, f"unet.enc.{r}x{r}_block{number}", outputs, attends=r in self.attention)
                left.append(x)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            r = side >> level
            if level == last:
                x = self.block(x, emb, f"unet.dec.{r}x{r}_in0", x.shape[1], attends=True)
                x = self.block(x, emb, f"unet.dec.{r}x{r}_in1", x.shape[1])
            else:
                x = self.block(x, emb, f"unet.dec.{r}x{r}_up", x.shape[1], "up")
            for number in range(self.blocks + 1):
                other, outputs = left.pop(), self.channels * multiplier
                factor = math.sqrt(2 * (x.shape[1] + other.shape[1])) / 2
                x = torch.cat([x * factor / x.shape[1] ** 0.5, other * factor / other.shape[1] ** 0.5], dim=1)
                x = self.block(x, emb, f"unet.dec.{r}x{r}_block{number}", outputs, attends=r in self.attention)
        return self.linear(x, "unet.out_conv", self.image, 3) * self.weight("unet.out_gain")

    def u(self, c_noise: Tensor) -> Tensor:
        """The logarithm of the loss that it expects."""
        return self.linear(self.fourier(c_noise, "logvar_fourier", 128), "logvar_linear", 1)[:, 0]
