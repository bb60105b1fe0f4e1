"""A directory of class folders of ordinary image files as a data set: SOURCE/CLASS/any/name.jpg."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_pipeline.decode import UNREADABLE_IMAGE
from data_pipeline.description import Channels, DatasetDescription
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.pictures import FORMATS, GRAY_MODES, Transform
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.readers import FileReader
from data_pipeline.samples import Samples, listing_digest, samples_of, stem
from data_pipeline.shards import Job
from data_pipeline.sources.checks import check_resolution, check_share
from data_pipeline.split import held_out
from data_pipeline.storage import is_remote, local_path


class ClassFolders(NamedTuple):
    """The files below SOURCE/CLASS/, classes and files sorted by name."""

    classes: list[str]
    samples: Samples
    reader: FileReader

    @property
    def digest(self) -> str:
        """sha256 over the names and sizes of the files."""
        sizes = ((self.reader.root / name).stat().st_size for name in self.reader.names)
        return listing_digest(self.reader.names, sizes)


def prepare_folder(
    source: str | Path,
    dest: str | Path,
    resolution: int,
    *,
    test_share: float = 0.1,
    output: Output | None = None,
    job: Job | None = None,
) -> DatasetDescription:
    """Write SOURCE/CLASS/... to the folder or bucket `dest`, or verify the one there; DataError names what is wrong.

    Classes are the names of the sub-folders, sorted. Images are turned upright and cropped to `resolution` as in ADM
    (see `center_crop`); they are gray where every file is gray, else RGB; transparency becomes white. `test_share` in
    [0, 1) of each class is held out (see `stratified_split`); with 0 there is no test split.
    """
    output = output or Output()
    root = local_path(str(source)).absolute()
    check_resolution(resolution)
    check_share(test_share)
    _check_places(root, str(dest))
    found = read_class_folders(root, least=2 if test_share else 1)
    samples = found.samples.limited(output.limit)
    names = found.reader.names
    channels: Channels = 1 if _all_gray(found.reader) else 3
    plan = DatasetPlan(
        name=root.name,
        classes=found.classes,
        shape=(channels, resolution, resolution),
        licence="that of the source",
        source=str(root),
        recipe={"resolution": resolution, "test_share": test_share, "files": found.digest, **output.recipe()},
        splits=held_out(samples, [names[number] for number in samples.numbers.tolist()], test_share),
        transform=Transform(resolution, channels, as_photo=True),
        output=output,
    )
    return publish(dest, plan, job)


def read_class_folders(root: Path, least: int = 1) -> ClassFolders:
    """The files below `root`; DataError unless there are classes, of `least` files or more each."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root} holds no class folders: put the images of each class into a folder of its own.")
    files = [_files(root, folder, least) for folder in folders]
    names = tuple(name for names in files for name in names)
    reader = FileReader(root, names)
    labels = [label for label, names in enumerate(files) for _ in names]
    return ClassFolders([folder.name for folder in folders], samples_of(map(stem, names), labels, reader), reader)


def _check_places(root: Path, dest: str) -> None:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give a directory that holds one folder of images per class.")
    if not is_remote(dest) and local_path(dest).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{dest} lies inside the source folder {root}: choose a destination outside it.")


def _files(root: Path, folder: Path, least: int) -> list[str]:
    """The files of one class, sorted by name; hidden ones do not count."""
    paths = (path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in paths if "/." not in name)
    if not names:
        raise DataError(f"{folder} holds no image: add images or remove the folder.")
    if len(names) < least:
        raise DataError(
            f"{folder} holds one image, but training and test need one each: add images, remove the folder, or "
            "prepare without a test split (--test-share 0)."
        )
    return names


def _all_gray(reader: FileReader) -> bool:
    """Whether every image that can be read is gray, from their headers."""
    return all(_is_gray(reader.root / name) for name in reader.names)


def _is_gray(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in GRAY_MODES
    except UNREADABLE_IMAGE:
        return True  # no say; it is refused or skipped when it is read
