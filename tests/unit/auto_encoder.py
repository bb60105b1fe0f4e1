"""A tiny auto-encoder of Stable Diffusion's kind, with random weights, as diffusers stores it."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image


def write_auto_encoder(folder: Path, channels: int = 4) -> Path:
    """Factor 2, latents of `channels`."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
    )
    model.save_pretrained(folder)
    return folder


def write_photos(root: Path, count: int = 22) -> Path:
    """Images of noise in two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 18, 3), np.uint8)).save(path)
    return root
