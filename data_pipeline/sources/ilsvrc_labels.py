"""The classes of ImageNet's validation images, from any of the files in which they are handed around."""

import io
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.samples import stem

TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
MOST_BYTES = 2**26  # of either; the real ones have less than 2 MB
_WNID = re.compile(r"n\d{8}")


def read_labels(path: Path, images: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The wnid of each of the `images`, whose names are sorted; `classes` are the wnids in class order.

    `path` is ILSVRC2012_devkit_t12.tar.gz, its ground truth beside its meta.mat, or a text of one line per image: a
    wnid; a name and a wnid (Kaggle's LOC_val_solution.csv); a name and a class number (Caffe's val.txt).
    """
    text, meta = _texts(path)
    lines = [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]
    if lines and lines[0][0].lower() == "imageid":
        lines = lines[1:]
    if len(lines) != len(images):
        raise DataError(f"{path} has {len(lines)} labels for {len(images)} validation images: give the file of these.")
    if all(len(line) == 1 and _WNID.fullmatch(line[0]) for line in lines):
        return [line[0] for line in lines]
    if all(len(line) == 1 and line[0].isdecimal() for line in lines):
        return _of_kit(path, [int(line[0]) for line in lines], meta)
    if all(len(line) >= 2 for line in lines):
        return _of_names(path, lines, images, classes)
    raise DataError(f"{path} is no list of labels: give the development kit, or a text of one wnid per image.")


def _texts(path: Path) -> tuple[str, Callable[[], bytes]]:
    """The labels' text, and what gives the kit's meta.mat."""
    try:
        if tarfile.is_tarfile(path):
            return _member(path, TRUTH).decode(), lambda: _member(path, META)
        return path.read_text(), path.with_name(META).read_bytes
    except (OSError, UnicodeError, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): give ILSVRC2012_devkit_t12.tar.gz or a text file."
        ) from error


def _member(path: Path, name: str) -> bytes:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isreg() and member.name.rpartition("/")[2] == name and member.size <= MOST_BYTES:
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise DataError(f"{path} holds no {name}: give ILSVRC2012_devkit_t12.tar.gz.")


def _of_kit(path: Path, numbers: Sequence[int], read_meta: Callable[[], bytes]) -> list[str]:
    """The wnids of the development kit's own class numbers, which are not the usual ones."""
    from scipy.io import loadmat  # of scikit-learn; only here

    try:
        synsets = loadmat(io.BytesIO(read_meta()), squeeze_me=True, variable_names=["synsets"])["synsets"]
        wnids = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        return [wnids[number] for number in numbers]
    except FileNotFoundError as error:
        raise DataError(
            f"{path} has the development kit's class numbers, which its {META} explains: put that beside it, or give "
            "ILSVRC2012_devkit_t12.tar.gz."
        ) from error
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError, OSError) as error:
        raise DataError(f"{META} of {path} does not explain its class numbers: get the kit again.") from error


def _of_names(path: Path, lines: Sequence[Sequence[str]], images: Sequence[str], classes: Sequence[str]) -> list[str]:
    labels = {stem(line[0]): line[1] for line in lines}
    absent = next((image for image in images if image not in labels), None)
    if absent is not None:
        raise DataError(f"{path} has no label of {absent}: give the file of these images.")
    found = [labels[image] for image in images]
    if all(_WNID.fullmatch(label) for label in found):
        return found
    if not all(label.isdecimal() and int(label) < len(classes) for label in found):
        raise DataError(f"{path} has labels that are neither wnids nor numbers below {len(classes)}: check the file.")
    return [classes[int(label)] for label in found]
