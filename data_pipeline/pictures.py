"""Image files of any origin -> pixels of one size, and pixels -> the files inside shards."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.decode import MODES, UNREADABLE_IMAGE, encode_png, to_array
from data_pipeline.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that start no other program
GRAY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # how samples are written -> suffix inside the shard
MOST_PIXELS = 2**27  # of a resized image before it is cropped: a strip of one pixel's height would fill the memory


class UnreadableImageError(DataError):
    """One image of a source cannot be used; `--skip-broken` leaves it out."""


@dataclass(frozen=True)
class Transform:
    """How an image file becomes pixels."""

    resolution: int  # side of the square, in pixels
    channels: int  # 1 or 3
    as_photo: bool = False  # turned as its EXIF says, white under transparency; else what published code does: neither

    def __call__(self, encoded: bytes, name: str) -> tuple[np.ndarray, bool]:
        """Pixels uint8 (C, H, W), and whether the image was smaller and had to be enlarged.

        UnreadableImageError says `name` where the file is no image, damaged, or not of 8 bits per channel.
        """
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as file:
                _check_mode(file, name)
                image = _opaque(ImageOps.exif_transpose(file)) if self.as_photo else file
                image = image.convert(MODES[self.channels])
        except UNREADABLE_IMAGE as error:
            raise unreadable(name) from error
        return to_array(center_crop(image, self.resolution, name)), min(image.size) < self.resolution


def center_crop(image: Image.Image, side: int, name: str) -> Image.Image:
    """The central square of side `side`, as ADM cuts it (guided-diffusion, image_datasets.py: center_crop_arr).

    Halved by boxes while both sides are at least twice as long, then resized bicubically so that the shorter side fits,
    then cropped. Smaller images are enlarged.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(MOST_PIXELS, side * side):
        raise UnreadableImageError(
            f"{name} is {image.width}x{image.height} pixels, too long a strip for {side}x{side}: remove it."
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def encode(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
    """The file of an image uint8 (C, H, W) as `png`, `jpeg` or `webp`; the same pixels give the same bytes.

    `quality` (1 to 100) is for the last two. Colours of JPEGs keep their full resolution.
    """
    if image_format == "png":
        return encode_png(pixels)
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    else:
        image.convert("RGB").save(buffer, format="WEBP", quality=quality)
    return buffer.getvalue()


def unreadable(name: str) -> UnreadableImageError:
    return UnreadableImageError(
        f"{name} is not a readable image: replace it, take it out of the source, or give --skip-broken."
    )


def _check_mode(file: Image.Image, name: str) -> None:
    if file.mode not in GRAY_MODES + COLOUR_MODES:
        raise UnreadableImageError(
            f"{name} has pixels of type {file.mode}: convert it to 8 bits per channel, or remove it."
        )


def _opaque(image: Image.Image) -> Image.Image:
    """The image over white, since the colours under transparent pixels are arbitrary."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
