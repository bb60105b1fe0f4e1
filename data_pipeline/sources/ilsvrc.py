"""ImageNet (ILSVRC2012) as it is handed out: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit.

The training archive is a tar of one tar per class; its images are read where they lie, so nothing is unpacked. Class
numbers are those that everyone uses: the WordNet ids, sorted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.description import DatasetDescription
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.pictures import Transform
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.readers import MemberReader
from data_pipeline.samples import Samples, listing_digest, samples_of, stem
from data_pipeline.shards import Job
from data_pipeline.sources.checks import check_resolution
from data_pipeline.sources.folder import read_class_folders
from data_pipeline.sources.ilsvrc_labels import read_labels
from data_pipeline.storage import local_path
from data_pipeline.tars import Member, is_tar, scan

LICENCE = "ImageNet's terms of access: non-commercial research and education only; the images belong to their owners"


def prepare_ilsvrc(
    train: str | Path,
    dest: str | Path,
    resolution: int,
    *,
    val: str | Path | None = None,
    val_labels: str | Path | None = None,
    output: Output | None = None,
    job: Job | None = None,
) -> DatasetDescription:
    """Write ImageNet to the folder or bucket `dest`, or verify the one there; DataError names what is wrong.

    `train` is ILSVRC2012_img_train.tar or a folder of class folders. `val`, which becomes the split `test`, is
    ILSVRC2012_img_val.tar, whose labels are in `val_labels` (see `read_labels`), or a folder of class folders. Images
    become RGB and are cropped to `resolution` as in ADM (see `center_crop`); orientation tags are not followed, as in
    published code.
    """
    output = output or Output()
    check_resolution(resolution)
    classes, samples, digest = _train(_present(train))
    splits, digests = {"train": samples.limited(output.limit)}, {"train_files": digest}
    if val is not None:
        test, digests["val_files"] = _val(_present(val), val_labels, classes)
        splits["test"] = test.limited(output.limit)
    plan = DatasetPlan(
        name=f"imagenet{resolution}",
        classes=classes,
        shape=(3, resolution, resolution),
        licence=LICENCE,
        source=str(train),
        recipe={"resolution": resolution, **digests, **output.recipe()},
        splits=splits,
        transform=Transform(resolution, channels=3),
        output=output,
    )
    return publish(dest, plan, job)


def _present(path: str | Path) -> Path:
    found = local_path(str(path)).absolute()
    if not found.exists():
        raise DataError(f"{found} does not exist: give the path of the archive or of the folder of class folders.")
    return found


def _train(path: Path) -> tuple[list[str], Samples, str]:
    """Classes, samples and the digest of what is there."""
    if path.is_dir():
        found = read_class_folders(path)
        return found.classes, found.samples, found.digest
    archives = sorted(_class_archives(path), key=lambda member: member.name)
    images = [[image for image in scan(path, archive) if _is_image(image)] for archive in archives]
    empty = next((archive.name for archive, found in zip(archives, images, strict=True) if not found), None)
    if empty is not None:
        raise DataError(f"{path}: {empty} holds no images: get the archive again.")
    labels = np.repeat(np.arange(len(images)), [len(found) for found in images])
    members = [image for found in images for image in found]
    return [stem(archive.name) for archive in archives], *_members(path, members, labels)


def _class_archives(path: Path) -> list[Member]:
    if not is_tar(path):
        raise DataError(f"{path} is not a tar: give ILSVRC2012_img_train.tar or a folder of class folders.")
    archives = list(scan(path))
    if not archives or not all(member.name.endswith(".tar") for member in archives):
        raise DataError(f"{path} is not a tar of one tar per class: give ILSVRC2012_img_train.tar.")
    classes = [stem(member.name) for member in archives]
    if len(set(classes)) != len(classes):
        raise DataError(f"{path} holds a class twice: get the archive again.")
    return archives


def _val(path: Path, labels: str | Path | None, classes: Sequence[str]) -> tuple[Samples, str]:
    """Samples and the digest of what is there; every class must have some."""
    numbers = {name: number for number, name in enumerate(classes)}
    if path.is_dir():
        found = read_class_folders(path)
        _check_classes(path, found.classes, numbers)
        relabelled = np.array([numbers[name] for name in found.classes], np.int32)[found.samples.labels]
        return samples_of([key.decode() for key in found.samples.keys], relabelled, found.reader), found.digest
    if labels is None:
        raise DataError(
            f"{path} holds no classes: give --val-labels ILSVRC2012_devkit_t12.tar.gz, or a text file of wnids."
        )
    if not is_tar(path):
        raise DataError(f"{path} is not a tar: give ILSVRC2012_img_val.tar or a folder of class folders.")
    images = sorted((member for member in scan(path) if _is_image(member)), key=lambda member: member.name)
    wnids = read_labels(local_path(str(labels)), [stem(image.name) for image in images], classes)
    _check_classes(path, wnids, numbers)
    return _members(path, images, [numbers[wnid] for wnid in wnids])


def _check_classes(path: Path, found: Sequence[str], known: Mapping[str, int]) -> None:
    strange, missing = sorted(set(found) - known.keys()), sorted(known.keys() - set(found))
    if strange:
        raise DataError(f"{path} has images of {_some(strange)}, which the training images lack: check both.")
    if missing:
        raise DataError(f"{path} has no images of {_some(missing)}, which the training images have: check both.")


def _some(names: Sequence[str]) -> str:
    return f"class {names[0]}" if len(names) == 1 else f"{len(names)} classes ({names[0]} ...)"


def _members(path: Path, members: Sequence[Member], labels: Sequence[int] | np.ndarray) -> tuple[Samples, str]:
    reader = MemberReader(
        path,
        names=np.array([member.name.encode() for member in members]),
        offsets=np.array([member.offset for member in members], np.int64),
        sizes=np.array([member.size for member in members], np.int64),
    )
    digest = listing_digest((member.name for member in members), (member.size for member in members))
    return samples_of((stem(member.name) for member in members), labels, reader), digest


def _is_image(member: Member) -> bool:
    return member.name.lower().endswith((".jpeg", ".jpg", ".png"))
