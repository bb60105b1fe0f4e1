"""One sample: its byte range of a tar shard -> image and label.

Only the suffixes named here are read and nothing is ever unpickled; an image's size is checked before it is decoded, so
a small file cannot blow up in memory.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # suffix -> the only decoder tried
LABEL = "cls"
LABEL_DIGITS = 9
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
# What Pillow raises for files that are damaged, cut short or not images.
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class BadSampleError(Exception):
    """Why a byte range is not a sample, as a clause; the reader adds the shard, the key and the mend."""


class Sample(NamedTuple):
    """The members of one sample, still encoded."""

    key: str
    suffix: str  # of the image
    image: bytes
    label: int


def decode_sample(data: bytes, crc32: int, shape: tuple[int, int, int]) -> tuple[str, np.ndarray, int]:
    """(key, image uint8 (C, H, W), label) of a byte range; BadSampleError where anything is not as it must be."""
    if zlib.crc32(data) != crc32:
        raise BadSampleError("its checksum does not match the index")
    sample = parse_sample(data)
    return sample.key, decode_image(sample.image, IMAGE_FORMATS[sample.suffix], shape), sample.label


def parse_sample(data: bytes) -> Sample:
    """The one image and the label in the tar members of `data`, which must share a key."""
    members = dict(_members(data))
    keys = {name.partition(".")[0] for name in members}
    suffixes = {name.partition(".")[2]: name for name in members}
    images = [suffix for suffix in suffixes if suffix in IMAGE_FORMATS]
    if len(keys) != 1 or len(images) != 1 or set(suffixes) != {LABEL, *images}:
        raise BadSampleError("it is not one image (.png, .jpg, .jpeg or .webp) with one .cls label")
    label = members[suffixes[LABEL]]
    if not label.isdigit() or len(label) > LABEL_DIGITS:
        raise BadSampleError("its .cls is not a class number")
    return Sample(keys.pop(), images[0], members[suffixes[images[0]]], int(label))


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each tar member."""
    offset = 0
    while offset < len(data):
        try:
            header = tarfile.TarInfo.frombuf(data[offset : offset + tarfile.BLOCKSIZE], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise BadSampleError("it is not a sequence of tar members") from error
        start = offset + tarfile.BLOCKSIZE
        if not header.isreg() or not 0 <= header.size <= len(data) - start:
            raise BadSampleError("it is not a sequence of plain files")
        yield header.name, data[start : start + header.size]
        offset = start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def decode_image(encoded: bytes, image_format: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The image as uint8 (C, H, W); BadSampleError if it is damaged or of another shape."""
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(encoded), formats=[image_format]) as image:
            if (image.mode, image.size) != (MODES[channels], (width, height)):
                raise BadSampleError(f"its image is {image.mode} {image.width}x{image.height}, not {width}x{height}")
            return to_array(image)
    except UNREADABLE_IMAGE as error:
        raise BadSampleError("its image cannot be decoded") from error


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (C, H, W) of a gray or RGB image."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of an image uint8 (C, H, W); the same pixels give the same bytes."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
