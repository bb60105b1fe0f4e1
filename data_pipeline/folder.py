"""A directory of class folders of ordinary image files as a data set: SOURCE/CLASS/any/name.jpg."""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.decode import MODES, UNREADABLE_IMAGE, to_array
from data_pipeline.description import Channels, DatasetDescription
from data_pipeline.errors import DataError
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.shards import Progress, Source
from data_pipeline.split import stratified_split
from data_pipeline.storage import local_path

SAMPLES_PER_SHARD = 4096
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that start no other program
GRAY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class _File(NamedTuple):
    path: Path
    name: str  # relative to the source, with /
    label: int


def prepare_folder(
    source: str | Path, dest: str | Path, resolution: int, test_share: float = 0.1, progress: Progress = list
) -> DatasetDescription:
    """Write SOURCE/CLASS/... to the folder `dest`, or verify the one there; DataError names the file that is wrong.

    Classes are the names of the sub-folders, sorted. Images are turned upright, cropped to their central square and
    resized to `resolution` pixels with antialiasing; they are gray where every file is gray, else RGB; transparency
    becomes white. `test_share` in (0, 1) of each class is held out (see `stratified_split`). `progress` wraps the
    sequence of samples as they are written, once per split.
    """
    root, target = local_path(str(source)).absolute(), local_path(str(dest)).absolute()
    _check_arguments(root, target, resolution, test_share)
    classes = _class_folders(root)
    files = [file for label, folder in enumerate(classes) for file in _files(root, folder, label)]
    channels: Channels = 1 if all(_is_gray(file.path) for file in files) else 3
    sources = [
        Source(f"{number:08d}", file.label, partial(load_image, file.path, resolution, channels))
        for number, file in enumerate(files)
    ]
    parts = stratified_split([file.name for file in files], [file.label for file in files], test_share)
    plan = DatasetPlan(
        name=root.name,
        classes=[folder.name for folder in classes],
        shape=(channels, resolution, resolution),
        licence="that of the source",
        source=str(root),
        recipe={"resolution": resolution, "test_share": test_share, "files": _listing_digest(files)},
        splits={split: [sources[p] for p in positions] for split, positions in parts.items()},
        samples_per_shard=SAMPLES_PER_SHARD,
    )
    return publish(target, plan, progress)


def load_image(path: Path, resolution: int, channels: int) -> np.ndarray:
    """The central square of an image file as uint8 (channels, resolution, resolution); DataError if unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.mode not in GRAY_MODES + COLOUR_MODES:
                raise DataError(
                    f"{path} has pixels of type {file.mode}: convert it to 8 bits per channel or remove it."
                )
            image = _opaque(ImageOps.exif_transpose(file)).convert(MODES[channels])
    except UNREADABLE_IMAGE as error:
        raise _unreadable(path) from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return to_array(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))


def _opaque(image: Image.Image) -> Image.Image:
    """The image over white, since the colours under transparent pixels are arbitrary."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def _check_arguments(root: Path, target: Path, resolution: int, test_share: float) -> None:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give a directory that holds one folder of images per class.")
    if target.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{target} lies inside the source folder {root}: choose a destination outside it.")
    if resolution < 1:
        raise DataError(f"resolution is {resolution}: give a number of pixels of at least 1.")
    if not 0 < test_share < 1:
        raise DataError(f"test_share is {test_share}: give a share between 0 and 1, such as 0.1.")


def _class_folders(root: Path) -> list[Path]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root} holds no class folders: put the images of each class into a folder of its own.")
    return folders


def _files(root: Path, folder: Path, label: int) -> list[_File]:
    """The files of one class, sorted by name; hidden ones do not count."""
    names = sorted(path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [_File(root / name, name, label) for name in names if "/." not in name]
    if len(files) < 2:
        count = "one image" if files else "no image"
        raise DataError(
            f"{folder} holds {count}, but training and test need one each: add images or remove the folder."
        )
    return files


def _is_gray(path: Path) -> bool:
    """Whether an image file is gray, from its header; DataError if it is not an image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in GRAY_MODES
    except UNREADABLE_IMAGE as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> DataError:
    return DataError(f"{path} is not a readable image: replace it, or move it out of the class folder.")


def _listing_digest(files: Sequence[_File]) -> str:
    """sha256 over the names and sizes of the source files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0{file.path.stat().st_size}\n"))
    return digest.hexdigest()
