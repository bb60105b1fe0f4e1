"""Stable Diffusion's auto-encoder (diffusers' AutoencoderKL) from a folder of the user's; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.latents import CONVENTIONS, ConventionName
from sctrain.errors import UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_WANTED = f"download sd-vae-ft-mse yourself, and name the folder that holds its {CONFIG} and {WEIGHTS}"
_DECODED_AT_ONCE = 8  # latents: a picture of 512x512 takes the decoder 1.3 GB


@dataclass(frozen=True)
class Vae:
    """An auto-encoder in one convention of latents."""

    model: Any  # AutoencoderKL
    convention: ConventionName
    identity: str  # digest of its description and weights
    software: tuple[str, ...] = ("torch", "diffusers")

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of this size; UserError unless it is a multiple of the factor."""
        if height % self.factor or width % self.factor:
            raise UserError(f"the auto-encoder needs sides of multiples of {self.factor}, not {height}x{width}")
        return self.model.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (B, 3, H, W) -> float32 (B, 2C, h, w), means above standard deviations; bit for bit repeatable."""
        seen = CONVENTIONS[self.convention]
        # Of one layout in memory, for another layout takes another algorithm, which rounds otherwise.
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.model.device).float() / 255
        with _exact():
            gaussian = self.model.encode(pixels * (seen.high - seen.low) + seen.low).latent_dist
        return torch.cat([gaussian.mean, gaussian.std], dim=1).cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the encoder gives them (B, C, h, w) -> uint8 (B, 3, H, W) on the same device."""
        seen = CONVENTIONS[self.convention]
        with _exact():
            parts = [self.model.decode(part.to(self.model.device)).sample for part in latents.split(_DECODED_AT_ONCE)]
        pixels = (torch.cat(parts) - seen.low) / (seen.high - seen.low)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8).to(latents.device)


def load_vae(folder: Path, convention: ConventionName, device: torch.device | str = "cpu") -> Vae:
    """The auto-encoder in `folder`, in float32. UserError names what is missing or does not fit, and the mend."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: {_WANTED}")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"the auto-encoder in {folder}: {error}; pip install 'sctrain[vae]'") from error
    model = _built(AutoencoderKL, folder)
    channels, wanted = model.config.latent_channels, len(CONVENTIONS[convention].mean)
    if channels != wanted:
        raise UserError(
            f"{folder} has latents of {channels} channels, those of '{convention}' have {wanted}: {_WANTED}"
        )
    return Vae(model.float().eval().requires_grad_(False).to(device), convention, _identity(folder))


def _built(family: Any, folder: Path) -> nn.Module:
    """Built by diffusers, which knows the older names of weights; from safetensors alone, which run no code."""
    try:
        described = json.loads((folder / CONFIG).read_text())
        if described.get("_class_name") != "AutoencoderKL":
            raise UserError(f"{folder} holds a {described.get('_class_name')}, not an AutoencoderKL: {_WANTED}")
        return family.from_pretrained(folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} holds no auto-encoder that can be read ({reason}): {_WANTED}") from error


def _identity(folder: Path) -> str:
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"AutoencoderKL-{digest.hexdigest()[:32]}"


def _exact() -> Any:
    """No choice of algorithms by their speed, no TF32: the same images give the same latents."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
