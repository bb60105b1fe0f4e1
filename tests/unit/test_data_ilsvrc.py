"""Preparing ImageNet from its own archives, in miniature."""

from pathlib import Path

import numpy as np
import pytest
from archives import (
    KIT_NUMBERS,
    WNIDS,
    colour_classes,
    coloured,
    encoded,
    ilsvrc_kit,
    ilsvrc_train,
    ilsvrc_val,
    read_split,
    tar_bytes,
)
from PIL import Image

from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.shards import Job
from data_pipeline.sources.ilsvrc import prepare_ilsvrc

VAL = [2, 0, 1, 1, 2]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return ilsvrc_train(tmp_path / "ILSVRC2012_img_train.tar")


@pytest.fixture
def val(tmp_path: Path) -> Path:
    return ilsvrc_val(tmp_path / "ILSVRC2012_img_val.tar", VAL)


def test_training_archive_becomes_shards(train: Path, tmp_path: Path):
    description = prepare_ilsvrc(train, tmp_path / "out", 16)
    assert description.classes == WNIDS and description.shape == (3, 16, 16) and "test" not in description.splits
    assert "non-commercial" in description.licence and description.name == "imagenet16"
    images, labels, keys = read_split(tmp_path / "out", "train")
    assert colour_classes(images) == labels == [WNIDS.index(key.partition("_")[0]) for key in keys]
    assert sorted(keys) == sorted(f"{wnid}_{number}" for wnid in WNIDS for number in range(4)) != keys


def test_labels_of_validation_images_in_every_form(train: Path, val: Path, tmp_path: Path):
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(VAL) + 1)]
    texts = {
        "synsets.txt": "\n".join(WNIDS[label] for label in VAL),
        "val.txt": "".join(f"{name}.JPEG {label}\n" for name, label in zip(names, VAL, strict=True)),
        "kaggle.csv": "ImageId,PredictionString\n"
        + "".join(f"{name},{WNIDS[label]} 1 2 3 4\n" for name, label in reversed(list(zip(names, VAL, strict=True)))),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    ilsvrc_kit(tmp_path / "devkit.tar.gz", VAL)
    for source in ("devkit.tar.gz", *texts):
        out = tmp_path / f"out-{source}"
        prepare_ilsvrc(train, out, 16, val=val, val_labels=tmp_path / source)
        images, labels, keys = read_split(out, "test")
        assert colour_classes(images) == labels, source
        assert [VAL[names.index(key)] for key in keys] == labels and sorted(keys) == names


def test_validation_folder(train: Path, tmp_path: Path):
    for label, wnid in enumerate(WNIDS):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "x.JPEG").write_bytes(coloured(label))
    prepare_ilsvrc(train, tmp_path / "out", 16, val=tmp_path / "val")
    images, labels, _ = read_split(tmp_path / "out", "test")
    assert colour_classes(images) == labels and sorted(labels) == [0, 1, 2]
    (tmp_path / "val" / WNIDS[1] / "x.JPEG").unlink()
    (tmp_path / "val" / WNIDS[1]).rmdir()
    with pytest.raises(DataError, match=f"has no images of class {WNIDS[1]}, which the training images have"):
        prepare_ilsvrc(train, tmp_path / "other", 16, val=tmp_path / "val")
    (tmp_path / "val" / WNIDS[0]).rename(tmp_path / "val" / "n99999999")
    with pytest.raises(DataError, match="has images of class n99999999, which the training images lack"):
        prepare_ilsvrc(train, tmp_path / "other", 16, val=tmp_path / "val")


def test_class_folders_give_the_same_images_as_the_archive(train: Path, tmp_path: Path):
    for label, wnid in enumerate(WNIDS):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(coloured(label, 20 + number))
    prepare_ilsvrc(train, tmp_path / "a", 16)
    prepare_ilsvrc(tmp_path / "train", tmp_path / "b", 16)
    assert (tmp_path / "a" / "train-000000.tar").read_bytes() == (tmp_path / "b" / "train-000000.tar").read_bytes()


def test_odd_images_become_rgb(tmp_path: Path):
    half = Image.new("RGB", (24, 24))
    half.paste((255, 255, 255), (0, 0, 12, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    half.save(turned, exif=exif, quality=95)
    odd = {
        f"{WNIDS[0]}_cmyk.JPEG": encoded(Image.new("CMYK", (24, 24), (0, 255, 255, 0))),
        f"{WNIDS[0]}_gray.JPEG": encoded(Image.new("L", (24, 24), 77)),
        f"{WNIDS[0]}_alpha.JPEG": encoded(Image.new("RGBA", (24, 24), (250, 0, 0, 0)), "PNG"),  # as one of ImageNet's
        f"{WNIDS[0]}_turned.JPEG": turned.read_bytes(),
    }
    prepare_ilsvrc(ilsvrc_train(tmp_path / "train.tar", odd), tmp_path / "out", 8)
    images, _, keys = read_split(tmp_path / "out", "train")
    by_kind = {key.partition("_")[2]: image for key, image in zip(keys, images, strict=True)}
    assert by_kind["cmyk"].float().mean(dim=(1, 2)).argmax() == 0
    assert (by_kind["gray"].float() - 77).abs().max() <= 2
    assert by_kind["alpha"][:, 0, 0].tolist() == [250, 0, 0]  # the colour under the transparency, as .convert("RGB")
    assert by_kind["turned"][0, :, 0].min() > 200 and by_kind["turned"][0, :, 7].max() < 50  # tags are not followed


def test_smaller_images_are_enlarged_and_counted(train: Path, tmp_path: Path):
    description = prepare_ilsvrc(train, tmp_path / "out", 24)  # every image is 20 high
    assert description.enlarged == 12 and description.shape == (3, 24, 24)
    assert prepare_ilsvrc(train, tmp_path / "fit", 20).enlarged == 0


def test_limit_takes_the_first_of_each_class(train: Path, tmp_path: Path):
    prepare_ilsvrc(train, tmp_path / "out", 8, output=Output(limit=2))
    _, labels, keys = read_split(tmp_path / "out", "train")
    assert np.bincount(labels).tolist() == [2, 2, 2] and {key.partition("_")[2] for key in keys} == {"0", "1"}


def test_unreadable_images_are_named_or_left_out(tmp_path: Path):
    bad = {f"{WNIDS[0]}_bad.JPEG": b"no image", f"{WNIDS[0]}_cut.JPEG": coloured(0, 200, 200)[:700]}
    train = ilsvrc_train(tmp_path / "train.tar", bad)
    with pytest.raises(DataError, match=rf"train\.tar: {WNIDS[0]}_(bad|cut)\.JPEG is not a readable .* --skip-broken"):
        prepare_ilsvrc(train, tmp_path / "out", 8)
    description = prepare_ilsvrc(train, tmp_path / "out", 8, job=Job(skip_broken=True))
    assert sorted(description.skipped) == [f"{train}: {WNIDS[0]}_bad.JPEG", f"{train}: {WNIDS[0]}_cut.JPEG"]
    assert description.splits["train"].samples == 12
    assert colour_classes(read_split(tmp_path / "out", "train")[0]) == read_split(tmp_path / "out", "train")[1]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_archives_cut_short_are_noticed(train: Path, tmp_path: Path, share: float):
    data = train.read_bytes()
    train.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar.* (was cut short|is damaged or not a tar)"):
        prepare_ilsvrc(train, tmp_path / "out", 8)
    assert not (tmp_path / "out").exists()


def test_cut_between_two_classes_is_noticed(train: Path, tmp_path: Path):
    data = train.read_bytes()
    boundary = data.index(WNIDS[0].encode() + b".tar")  # the header of the last class
    train.write_bytes(data[:boundary])
    with pytest.raises(DataError, match="was cut short: get it again"):
        prepare_ilsvrc(train, tmp_path / "out", 8)


def test_other_archives_are_refused(train: Path, val: Path, tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    empty = tmp_path / "empty.tar"
    empty.write_bytes(tar_bytes({f"{WNIDS[0]}.tar": tar_bytes({})}))
    cases = [
        ((tmp_path / "nowhere.tar",), {}, "nowhere.tar does not exist"),
        ((text,), {}, "notes.txt is not a tar: give ILSVRC2012_img_train.tar"),
        ((val,), {}, "is not a tar of one tar per class"),
        ((empty,), {}, f"{WNIDS[0]}.tar holds no images"),
        ((train,), {"val": val}, "holds no classes: give --val-labels"),
        ((train,), {"val": text, "val_labels": text}, "notes.txt is not a tar"),
        ((train,), {"val": val, "val_labels": text}, "has 1 labels for 5 validation images"),
        ((train,), {"val": val, "val_labels": tmp_path / "nowhere"}, "nowhere cannot be read"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(DataError, match=message):
            prepare_ilsvrc(*arguments, tmp_path / "out", 8, **options)
    with pytest.raises(DataError, match="resolution is 0"):
        prepare_ilsvrc(train, tmp_path / "out", 0)


def test_numbers_of_the_kit_need_its_meta(train: Path, val: Path, tmp_path: Path):
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{KIT_NUMBERS[WNIDS[label]]}\n" for label in VAL))
    with pytest.raises(DataError, match=r"development kit's class numbers, which its meta\.mat explains: put that"):
        prepare_ilsvrc(train, tmp_path / "out", 8, val=val, val_labels=truth)
    (tmp_path / "meta.mat").write_bytes(b"not a mat file, but long enough to look like the header of one" * 4)
    with pytest.raises(DataError, match="does not explain its class numbers"):
        prepare_ilsvrc(train, tmp_path / "out", 8, val=val, val_labels=truth)
