"""The user's PNG and JPEG files as tensors; a picture that does not fit the model is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.decode import UNREADABLE_IMAGE, to_array
from sctrain.errors import UserError

FORMATS = ("PNG", "JPEG")
_NAMES = {"L": "gray", "RGB": "RGB"}  # Pillow's modes that a model can have, to people

Size = tuple[int, int]  # height, width


def read_picture(path: Path, modes: Collection[str], sizes: Collection[Size]) -> Tensor:
    """Uint8 (1 or 3, H, W), upright; UserError if it is no PNG or JPEG of one of the modes and sizes.

    `modes` are of Pillow's L and RGB; mode and size are seen before anything is decoded.
    """
    with _opened(path) as image:
        _check_mode(path, image, modes)
        return torch.from_numpy(np.array(to_array(_upright(path, image, sizes))))


def read_mask(path: Path, size: Size) -> Tensor:
    """Bool (H, W), true where the picture is white (at least half of it); UserError if it has another size."""
    with _opened(path) as image:
        if _is_transparent(image):
            raise UserError(f"{path} has transparency; a mask is black where the image is kept and white elsewhere")
        mask = torch.from_numpy(np.array(_upright(path, image, [size]).convert("L"))) >= 128
    if not mask.any():
        raise UserError(f"{path} has no white pixel, so there is nothing to generate; paint white what is to be")
    return mask


def write_pictures(images: Tensor, paths: Sequence[Path]) -> None:
    """Uint8 (N, 1 or 3, H, W) as files in their own size."""
    for image, path in zip(images, paths, strict=True):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; name a PNG or JPEG image") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name PNG or JPEG images") from None
    except PermissionError:
        raise UserError(f"{path} may not be read; allow reading it") from None
    except UNREADABLE_IMAGE:
        raise UserError(f"{path} cannot be read as a PNG or JPEG image; convert it to one") from None


def _upright(path: Path, image: Image.Image, sizes: Collection[Size]) -> Image.Image:
    """The picture as its camera was held; UserError if it is damaged or of none of the sizes."""
    if not {(image.height, image.width), (image.width, image.height)} & set(sizes):
        raise _wrong_size(path, image, sizes)  # before it is decoded: a small file may hold a huge image
    try:
        upright = ImageOps.exif_transpose(image)
    except UNREADABLE_IMAGE:
        raise UserError(f"{path} is damaged or cut short; save or copy it again") from None
    if (upright.height, upright.width) not in sizes:
        raise _wrong_size(path, upright, sizes)
    return upright


def _check_mode(path: Path, image: Image.Image, modes: Collection[str]) -> None:
    wanted = " or ".join(_NAMES[mode] for mode in modes)
    if _is_transparent(image):
        raise UserError(f"{path} has transparency; flatten it onto a background and save it as {wanted}")
    if image.mode not in modes:
        mode = _NAMES.get(image.mode, f"of Pillow's mode {image.mode}")
        raise UserError(f"{path} is {mode} and must be {wanted} for this model and edit; convert it")


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _wrong_size(path: Path, image: Image.Image, sizes: Collection[Size]) -> UserError:
    wanted = " or ".join(f"{width}x{height}" for height, width in sizes)
    size = f"{image.width}x{image.height}"
    return UserError(f"{path} is {size} pixels and must be {wanted} (width x height); crop or resize it")
