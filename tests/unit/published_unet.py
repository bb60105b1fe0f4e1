"""EDM's two U-Nets once more, as plain functions of weights by their published names; the weights are made on the way.

Written from the description of the architectures (Song et al. 2021, Dhariwal & Nichol 2021, Karras et al. 2022), with
nothing of the project's.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PublishedUNet:
    """`song`: DDPM++ and, with a filter of four taps, NCSN++; otherwise ADM."""

    song: bool
    taps: tuple[int, ...] = (1, 1)
    channels: int = 8
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (4,)
    head_channels: int = 4
    labels: int = 3
    scm: bool = False  # as edm2_sCM has it: scale and shift of unit size
    weights: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.randn(shape, dtype=torch.float64) / math.sqrt(max(math.prod(shape[1:]), 4))
        return self.weights[name]

    def linear(self, x: Tensor, name: str, outputs: int, bias: bool = True) -> Tensor:
        return F.linear(
            x,
            self.weight(f"{name}.weight", outputs, x.shape[1]),
            self.weight(f"{name}.bias", outputs) if bias else None,
        )

    def conv(self, x: Tensor, name: str, outputs: int, kernel: int = 3, padding: int | None = None) -> Tensor:
        weight = self.weight(f"{name}.weight", outputs, x.shape[1], kernel, kernel)
        padding = kernel // 2 if padding is None else padding
        return F.conv2d(x, weight, self.weight(f"{name}.bias", outputs), padding=padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        C = x.shape[1]
        weight, bias = self.weight(f"{name}.weight", C), self.weight(f"{name}.bias", C)
        return F.group_norm(x, min(32, C // 4), weight, bias, 1e-6 if self.song else 1e-5)

    def filtered(self, x: Tensor, how: str, padding: int | None = None) -> Tensor:
        """Pixel by pixel, as a convolution that is written out."""
        if not how:
            return x
        taps = torch.tensor(self.taps, dtype=x.dtype)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        padding = (len(taps) - 1) // 2 if padding is None else padding
        planes = x.reshape(-1, 1, *x.shape[2:])
        if how == "down":
            out = F.conv2d(planes, kernel[None, None], stride=2, padding=padding)
        else:
            out = F.conv_transpose2d(planes, 4 * kernel[None, None], stride=2, padding=padding)
        return out.reshape(*x.shape[:2], *out.shape[2:])

    def block(self, x: Tensor, emb: Tensor, name: str, outputs: int, how: str = "", attends: bool = False) -> Tensor:
        factor = math.sqrt(0.5) if self.song else 1.0
        y = self.conv(self.filtered(F.silu(self.norm(x, f"{name}.norm0")), how), f"{name}.conv0", outputs)
        told = self.linear(emb, f"{name}.affine", outputs * (1 if self.song and not self.scm else 2))[:, :, None, None]
        if self.scm:
            scale, shift = (part / part.square().mean(1, keepdim=True).sqrt() for part in told.split(outputs, dim=1))
            y = self.norm(y, f"{name}.norm1") * scale + shift
        elif self.song:
            y = self.norm(y + told, f"{name}.norm1")
        else:
            scale, shift = told.split(outputs, dim=1)
            y = self.norm(y, f"{name}.norm1") * (1 + scale) + shift
        y = self.conv(F.silu(y), f"{name}.conv1", outputs)
        skip = self.filtered(x, how)
        if x.shape[1] != outputs or (how and self.song):
            skip = self.conv(skip, f"{name}.skip", outputs, kernel=1)
        x = (skip + y) * factor
        if attends:
            heads = 1 if self.song else outputs // self.head_channels
            B, C, H, W = x.shape
            qkv = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv", 3 * C, kernel=1)
            q, k, v = qkv.reshape(B, heads, C // heads, 3, H * W).unbind(3)  # channels of a head, pixels
            shares = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(C // heads), dim=-1)
            mixed = torch.einsum("bhqk,bhck->bhcq", shares, v).reshape(B, C, H, W)
            x = (x + self.conv(mixed, f"{name}.proj", C, kernel=1)) * factor
        return x

    def embedding(self, c_noise: Tensor, one_hot: Tensor, augmentation: Tensor | None) -> Tensor:
        fourier, width = len(self.taps) == 4, 4 * self.channels
        size = self.channels * (2 if fourier else 1)
        steps = torch.arange(size // 2, dtype=torch.float64)
        if fourier:
            frequencies = 2 * math.pi * self.weight("map_noise.freqs", size // 2)
        else:
            frequencies = 1e-4 ** (steps / (size // 2 - (1 if self.song else 0)))
        angles = c_noise[:, None] * frequencies
        emb = torch.cat([angles.sin(), angles.cos()] if self.song else [angles.cos(), angles.sin()], dim=1)
        if self.song:
            emb = emb + self.linear(one_hot * math.sqrt(self.labels), "map_label", size)
        if augmentation is not None:
            emb = emb + self.linear(augmentation, "map_augment", size, bias=False)
        emb = self.linear(F.silu(self.linear(emb, "map_layer0", width)), "map_layer1", width)
        if not self.song:
            emb = emb + self.linear(one_hot, "map_label", width, bias=False)
        return F.silu(emb)

    def __call__(self, x: Tensor, c_noise: Tensor, one_hot: Tensor, augmentation: Tensor | None = None) -> Tensor:
        side, image, last = x.shape[-1], x, len(self.multipliers) - 1
        emb = self.embedding(c_noise, one_hot, augmentation)
        x = self.conv(x, f"enc.{side}x{side}_conv", self.channels)
        left = [x]
        for level, multiplier in enumerate(self.multipliers):
            r = side >> level
            if level:
                x = self.block(x, emb, f"enc.{r}x{r}_down", x.shape[1], "down")
                if len(self.taps) == 4:
                    wide = self.conv(image, f"enc.{r}x{r}_aux_residual", x.shape[1], padding=2)
                    x = image = (x + self.filtered(wide, "down", padding=0)) / math.sqrt(2)
                left.append(x)
            for number in range(self.blocks):
                outputs = self.channels * multiplier
                x = self.block(x, emb, f"enc.{r}x{r}_block{number}", outputs, attends=r in self.attention)
                left.append(x)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            r = side >> level
            if level == last:
                x = self.block(x, emb, f"dec.{r}x{r}_in0", x.shape[1], attends=True)
                x = self.block(x, emb, f"dec.{r}x{r}_in1", x.shape[1])
            else:
                x = self.block(x, emb, f"dec.{r}x{r}_up", x.shape[1], "up")
            for number in range(self.blocks + 1):
                attends = r in self.attention and (number == self.blocks or not self.song)
                x = torch.cat([x, left.pop()], dim=1)
                x = self.block(x, emb, f"dec.{r}x{r}_block{number}", self.channels * multiplier, attends=attends)
        norm, head = (f"dec.{side}x{side}_aux_norm", f"dec.{side}x{side}_aux_conv")
        norm, head = (norm, head) if self.song else ("out_norm", "out_conv")
        return self.conv(F.silu(self.norm(x, norm)), head, 3)
