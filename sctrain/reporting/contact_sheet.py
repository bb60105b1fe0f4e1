"""A contact sheet: images of a data set with the names of their classes, for people to look at."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from sctrain.reporting.grids import GROUND, INK, enlarged, font

TILE = 96  # pixels, at least, of an enlarged image
LARGEST = 256  # pixels of a reduced one: a sheet of full 512-pixel images fits no screen
GAP, MARGIN = 8, 16
TITLE, CAPTION = 34, 20  # pixels of height
FAINT = (150, 155, 163)


def contact_sheet(images: Tensor, captions: Sequence[str], title: str) -> Image.Image:
    """uint8 (N, C, H, W) of one or three channels, as near to a square of tiles as N allows, each over its caption."""
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    columns = math.ceil(math.sqrt(len(tiles) * (height + CAPTION + GAP) / (width + GAP)))
    rows = math.ceil(len(tiles) / columns)
    size = (
        max(2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + math.ceil(font(16).getlength(title))),
        2 * MARGIN + TITLE + rows * (height + CAPTION + GAP) - GAP,
    )
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN + TITLE / 2 - 6), title, INK, font(16), anchor="lm")
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left = MARGIN + place % columns * (width + GAP)
        top = MARGIN + TITLE + place // columns * (height + CAPTION + GAP)
        sheet.paste(tile, (left, top))
        draw.text((left + width / 2, top + height + CAPTION / 2), _fitting(caption, width), FAINT, font(), anchor="mm")
    return sheet


def _tile(image: Tensor) -> Image.Image:
    tile = enlarged(image, TILE)
    tile.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return tile


def _fitting(text: str, width: int) -> str:
    """The text, cut so that it is no wider than `width` pixels."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
