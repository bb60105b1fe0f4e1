"""One sample: its byte range of a tar shard -> array and label.

Only the suffixes named here are read and nothing is ever unpickled; the size of an image or array is checked before it
is decoded, so a small file cannot blow up in memory.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # suffix -> the only decoder tried
ARRAY = "npy"
LABEL = "cls"
LABEL_DIGITS = 9
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
# What Pillow raises for files that are damaged, cut short or not images.
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_BLOCK = 512  # bytes of a tar header; bodies are padded to it
_PLAIN_FILE = (ord("0"), 0)  # types of a tar member
# The start of a .npy file: version and length of the header, then what it claims.
_MAGIC = re.compile(rb"\x93NUMPY(?:\x01\x00(..)|[\x02\x03]\x00(....))", re.DOTALL)
_CLAIMS = re.compile(
    rb"\s*\{\s*'descr'\s*:\s*'([<>|=][a-zA-Z]\d{1,3})'\s*,\s*'fortran_order'\s*:\s*(True|False)\s*,"
    rb"\s*'shape'\s*:\s*\(([\d, ]{0,100})\)\s*(?:,\s*)?\}\s*"
)
MOST_HEADER = 1024  # bytes; numpy's own has 118


class BadSampleError(Exception):
    """Why a byte range is not a sample, as a clause; the reader adds the shard, the key and the mend."""


class Sample(NamedTuple):
    """The members of one sample, still encoded."""

    key: str
    suffix: str  # of the image or array
    image: bytes
    label: int


def decode_sample(
    data: bytes, crc32: int, shape: tuple[int, int, int], latent: str | None = None
) -> tuple[str, np.ndarray, int]:
    """(key, array (C, H, W), label) of a byte range; BadSampleError where anything is not as it must be.

    The array is an image, uint8, or if `latent` names a type an array of that type; `shape` is what it must have.
    """
    if zlib.crc32(data) != crc32:
        raise BadSampleError("its checksum does not match the index")
    sample = parse_sample(data)
    if (sample.suffix == ARRAY) != (latent is not None):
        raise BadSampleError(f"it holds a .{sample.suffix}, which is not what dataset.json describes")
    if latent is not None:
        return sample.key, decode_array(sample.image, shape, np.dtype(latent)), sample.label
    return sample.key, decode_image(sample.image, IMAGE_FORMATS[sample.suffix], shape), sample.label


def parse_sample(data: bytes) -> Sample:
    """The one image or array and the label in the tar members of `data`, which must share a key."""
    members = dict(_members(data))
    keys = {name.partition(".")[0] for name in members}
    suffixes = {name.partition(".")[2]: name for name in members}
    images = [suffix for suffix in suffixes if suffix in IMAGE_FORMATS or suffix == ARRAY]
    if len(keys) != 1 or len(images) != 1 or set(suffixes) != {LABEL, *images}:
        raise BadSampleError("it is not one image (.png, .jpg, .jpeg, .webp) or array (.npy) with one .cls label")
    label = members[suffixes[LABEL]]
    if not label.isdigit() or len(label) > LABEL_DIGITS:
        raise BadSampleError("its .cls is not a class number")
    return Sample(keys.pop(), images[0], members[suffixes[images[0]]], int(label))


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each tar member.

    `tarfile` takes 30 microseconds per sample, this 4. Its checks are not missed: the range has the checksum of the
    index, and what is not a plain file with a short name is refused here too.
    """
    offset = 0
    while offset < len(data):
        header = data[offset : offset + _BLOCK]
        digits = header[124:136].rstrip(b" \0")
        if len(header) < _BLOCK or not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise BadSampleError("it is not a sequence of tar members")
        start, size = offset + _BLOCK, int(digits, 8)
        if header[156] not in _PLAIN_FILE or header[345] or size > len(data) - start:
            raise BadSampleError("it is not a sequence of plain files")
        yield header[:100].partition(b"\0")[0].decode("utf-8", "replace"), data[start : start + size]
        offset = start + -(-size // _BLOCK) * _BLOCK


def decode_image(encoded: bytes, image_format: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The image as uint8 (C, H, W); BadSampleError if it is damaged or of another shape."""
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(encoded), formats=[image_format]) as image:
            # WebP has no gray images: theirs come as colours that are all alike.
            modes = ("RGB",) if image_format == "WEBP" else (MODES[channels],)
            if image.mode not in modes or image.size != (width, height):
                raise BadSampleError(f"its image is {image.mode} {image.width}x{image.height}, not {width}x{height}")
            return to_array(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    except UNREADABLE_IMAGE as error:
        raise BadSampleError("its image cannot be decoded") from error


def decode_array(encoded: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """A read-only array out of a `.npy` file; BadSampleError unless it has this very shape and type, in C order."""
    header = _array_header(shape, dtype)
    if not encoded.startswith(header):
        header = _foreign_header(encoded, shape, dtype)
    if len(encoded) - len(header) != dtype.itemsize * shape[0] * shape[1] * shape[2]:
        raise BadSampleError("its array is cut short or followed by something")
    return np.frombuffer(encoded, dtype, offset=len(header)).reshape(shape)


@cache
def _array_header(shape: tuple[int, int, int], dtype: np.dtype) -> bytes:
    """What `np.save` puts before such an array; reading a header takes longer than copying the array."""
    buffer = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def _foreign_header(encoded: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> bytes:
    """The header of a `.npy` file that another program wrote: same claims, other spelling.

    numpy's own parser takes headers for Python and fails on damaged ones in many ways, so it is not asked.
    """
    magic = _MAGIC.match(encoded)
    size = 0 if magic is None else int.from_bytes(magic[1] or magic[2], "little")
    claims = magic and size <= MOST_HEADER and _CLAIMS.fullmatch(encoded, magic.end(), magic.end() + size)
    if not magic or not claims:
        raise BadSampleError("its array cannot be decoded")
    descr, fortran, claimed = claims[1].decode(), claims[2] == b"True", tuple(map(int, re.findall(rb"\d+", claims[3])))
    if (descr, fortran, claimed) != (dtype.str, False, shape):
        raise BadSampleError(f"its array is {descr} {claimed}{' in columns' * fortran}, not {dtype.str} {shape}")
    return encoded[: claims.end()]


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


def encode_npy(array: np.ndarray) -> bytes:
    """`.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
