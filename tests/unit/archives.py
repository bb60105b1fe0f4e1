"""Tiny archives of the layouts in which data sets are handed out, and a look at what became of them."""

import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from data_pipeline.dataset import open_dataset

# Sorted, as everyone numbers them; the development kit numbers them otherwise.
WNIDS = ["n01440764", "n01443537", "n02085620"]
KIT_NUMBERS = {"n02085620": 1, "n01440764": 2, "n01443537": 3}
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]  # the class of an image is its strongest channel


def encoded(image: Image.Image, image_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return buffer.getvalue()


def coloured(label: int, width: int = 24, height: int = 20, image_format: str = "JPEG") -> bytes:
    return encoded(Image.new("RGB", (width, height), COLOURS[label]), image_format)


def tar_bytes(members: dict[str, bytes], kind: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=kind) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ilsvrc_train(path: Path, extra: dict[str, bytes] | None = None, per_class: int = 4) -> Path:
    """ILSVRC2012_img_train.tar; `extra` images go into the first class. Classes are not in order inside it."""
    classes = {}
    for label, wnid in reversed(list(enumerate(WNIDS))):
        images = {f"{wnid}_{number}.JPEG": coloured(label, 20 + number) for number in range(per_class)}
        classes[f"{wnid}.tar"] = tar_bytes(images | (extra or {} if label == 0 else {}))
    path.write_bytes(tar_bytes(classes))
    return path


def ilsvrc_val(path: Path, labels: list[int]) -> Path:
    """ILSVRC2012_img_val.tar; not in order inside it."""
    images = {f"ILSVRC2012_val_{number:08d}.JPEG": coloured(label) for number, label in enumerate(labels, 1)}
    path.write_bytes(tar_bytes(dict(reversed(images.items()))))
    return path


def ilsvrc_kit(path: Path, labels: list[int]) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz, with a synset above the leaves as in the real one."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, "words", 0) for wnid, number in sorted(KIT_NUMBERS.items(), key=lambda item: item[1])]
    synsets = np.array([*rows, (1001, "n00001740", "entity", 3)], kind)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets[:, None]})
    truth = "".join(f"{KIT_NUMBERS[WNIDS[label]]}\n" for label in labels).encode()
    root = "ILSVRC2012_devkit_t12/data"
    files = {f"{root}/meta.mat": buffer.getvalue(), f"{root}/ILSVRC2012_validation_ground_truth.txt": truth}
    path.write_bytes(tar_bytes(files, "w:gz"))
    return path


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings, as in the archive of 2009."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_string(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar10_batches(per_batch: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Random images uint8 (N, 3072) and labels of the six batches."""
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {
        name: (generator.integers(0, 256, (per_batch, 3072), np.uint8), generator.integers(0, 10, per_batch).tolist())
        for name in names
    }


def cifar10_python(path: Path, changed: dict[str, bytes] | None = None) -> Path:
    files = {
        name: python2_pickle({b"batch_label": name.encode(), b"labels": labels, b"data": images, b"filenames": [b"x"]})
        for name, (images, labels) in cifar10_batches().items()
    }
    files["batches.meta"] = python2_pickle({b"label_names": [b"airplane"]})
    files.update(changed or {})
    path.write_bytes(tar_bytes({f"cifar-10-batches-py/{name}": data for name, data in files.items()}, "w:gz"))
    return path


def cifar10_binary(path: Path) -> Path:
    files = {
        f"{name}.bin": np.concatenate([np.array(labels, np.uint8)[:, None], images], axis=1).tobytes()
        for name, (images, labels) in cifar10_batches().items()
    }
    path.write_bytes(tar_bytes({f"cifar-10-batches-bin/{name}": data for name, data in files.items()}, "w:gz"))
    return path


def read_split(folder: Path | str, split: str) -> tuple[torch.Tensor, list[int], list[str]]:
    """Images, labels and keys of a whole split."""
    dataset = open_dataset(str(folder), split)
    images, labels = dataset.read(np.arange(len(dataset)))
    return images, labels.tolist(), [key.decode() for key in dataset.index.key.tolist()]


def colour_classes(images: torch.Tensor) -> list[int]:
    """The class of each image by its colour."""
    return images.float().mean(dim=(2, 3)).argmax(dim=1).tolist()
