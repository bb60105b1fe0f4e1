"""Grids of images for people: smoothly enlarged, on a quiet ground, with labels where asked for."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 64  # pixels, at least, of an enlarged image
GAP = 4
GRID_COLUMNS, GRID_ROWS = 10, 8
GROUND = (28, 30, 34)
INK = (225, 228, 232)


def grid_indices(count: int, num_classes: int, rows: int = GRID_ROWS, columns: int = GRID_COLUMNS) -> list[int]:
    """Which of `count` images, labelled index % num_classes, fill a grid with one class per column, row by row."""
    columns = min(columns, num_classes)
    rows = max(1, min(rows, count // num_classes))
    return [
        index for row in range(rows) for index in range(row * num_classes, row * num_classes + columns) if index < count
    ]


def image_grid(
    images: Tensor,
    columns: int = GRID_COLUMNS,
    *,
    tile: int = TILE,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """uint8 (N, C, H, W), one or three channels, row by row -> an RGB picture; the last row may be short."""
    tiles = [enlarged(image, tile) for image in images]
    width, height = tiles[0].size
    left = 10 + max((_text_width(label) for label in row_labels), default=-10 + GAP)
    top = 22 if column_labels else GAP
    rows = -(-len(tiles) // columns)
    picture = Image.new("RGB", (left + columns * (width + GAP), top + rows * (height + GAP)), GROUND)
    for i, image in enumerate(tiles):
        picture.paste(image, (left + i % columns * (width + GAP), top + i // columns * (height + GAP)))
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(row_labels):
        draw.text((left - 5, top + row * (height + GAP) + height / 2), label, INK, font(), anchor="rm")
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + GAP) + width / 2, top / 2), label, INK, font(), anchor="mm")
    return picture


def enlarged(image: Tensor, tile: int = TILE) -> Image.Image:
    """uint8 (C, H, W) -> RGB, by a whole factor to at least `tile` pixels wide; larger images keep their size."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    factor = max(1, -(-tile // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


@cache
def font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures, `size` pixels high."""
    return ImageFont.load_default(size)


def _text_width(text: str) -> int:
    return round(font().getlength(text))
