"""A tiny auto-encoder of Stable Diffusion's kind, with random weights, as diffusers stores it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


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
