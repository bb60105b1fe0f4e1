"""`sctrain prepare` and `sctrain data` as people type them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from archives import coloured, ilsvrc_kit, ilsvrc_train, ilsvrc_val
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.verify import verify_dataset
from sctrain import cli
from sctrain.commands.data_arguments import byte_size

VAL = [2, 0, 1, 1, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet in miniature, in two training shards."""
    root = tmp_path_factory.mktemp("data")
    train, val = ilsvrc_train(root / "train.tar"), ilsvrc_val(root / "val.tar", VAL)
    labels = ilsvrc_kit(root / "kit.tar.gz", VAL)
    words = [train, root / "out", "--val", val, "--val-labels", labels, "--resolution", 16, "--samples-per-shard", 7]
    options = ["--format", "jpeg", "--quality", 90, "--processes", 1, "--verify", "--no-classifier"]
    assert cli.main(["prepare", "ilsvrc", *map(str, words), *map(str, options)]) == 0
    return root / "out"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_statistics_as_words_and_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "stat", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["classes"], found["height"], found["channels"]) == (3, 16, 3)
    assert found["recipe"]["format"] == "jpeg" and "non-commercial" in found["licence"]
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert (train["samples"], train["shards"], train["histogram"]) == (12, 2, [4, 4, 4])
    assert train["shard_samples"] == {"min": 5, "median": 6.0, "max": 7}
    assert test["histogram"] == [1, 2, 2] and test["class_sizes"]["smallest"]["n01440764"] == 1
    assert test["class_sizes"]["median"] == 2 and len(test["fingerprint"]) == 64
    sizes = [path.stat().st_size for path in folder.glob("train-*.tar")]
    assert train["bytes"] == sum(sizes) and train["shard_bytes"]["max"] == max(sizes)
    assert cli.main(["data", "stat", str(folder)]) == 0
    words = capsys.readouterr().out
    assert (
        "train: 12 samples in 2 shards" in words
        and "smallest: n01440764 1" in words
        and words.count("smallest") == 1
        and "left out     0" in words
    )


def test_sound_data_set(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "verify", str(folder), "--json", "--processes", "2"]) == 0
    output = capsys.readouterr()
    verdict = json.loads(output.out)
    assert verdict["samples"] == 17 and verdict["damaged"] == []
    assert "17 samples" in output.err and "all sound" in output.err


def test_every_damaged_sample_is_named(copy: Path, capsys: pytest.CaptureFixture[str]):
    flip(copy / "train-000001.tar", 700)
    flip(copy / "test-000000.tar", 3000)
    assert cli.main(["data", "verify", str(copy), "--processes", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "2 of 17 samples are damaged" in error
    assert "train-000001.tar: sample 'n0" in error and "test-000000.tar: sample 'ILSVRC2012_val_" in error
    assert len(verify_dataset(str(copy)).damaged) == 2


def test_what_lies_between_samples_is_noticed(copy: Path):
    """An index that leaves samples out, which plain webdataset would read."""
    with np.load(copy / "index-test.npz") as archive:
        columns = dict(archive)
    for name in ("key", "shard", "offset", "size", "label", "crc32"):
        columns[name] = np.delete(columns[name], 2)
    np.savez(copy / "index-test.npz", **columns)
    content = json.loads((copy / "dataset.json").read_text())
    from data_pipeline.index import load_index

    index = load_index(str(copy / "index-test.npz"))
    content["splits"]["test"] |= {"samples": 4, "fingerprint": index.fingerprint}
    (copy / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"test-000000\.tar has something before sample 'ILSVRC"):
        verify_dataset(str(copy)).require_sound(str(copy))


def test_contact_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "show", str(folder), "--out", str(tmp_path / "new" / "sheet.png"), "--count", "9"]) == 0
    assert "9 of 12 images" in capsys.readouterr().err
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 3 * 96 and sheet.height > 3 * 96
    out = tmp_path / "green.png"
    for name in ("n01443537", "1"):
        assert cli.main(["data", "show", str(folder), "--out", str(out), "--class", name]) == 0
        with Image.open(out) as sheet:
            pixels = np.asarray(sheet).astype(int)
        green = (pixels[..., 1] > 200) & (pixels[..., 0] < 60)
        red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60)
        assert green.sum() >= 4 * 90 * 90 and red.sum() == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class", "n7"], "--class n7 is neither a class's name nor a number from 0 to 2"),
        (["--class", "3"], "--class 3 is neither"),
        (["--split", "valid"], "has no split 'valid': choose one of test, train"),
        (["--count", "2000"], "too many for one picture"),
        (["--out", "sheet.pdf"], "does not end in .png"),
    ],
)
def test_mistakes_of_show(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "show", str(folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_preparing_tells_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(3):
        path = tmp_path / "photos" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(coloured(0) if number else b"broken")
    words = ["prepare", "folder", str(tmp_path / "photos"), str(tmp_path / "out"), "--resolution", "32"]
    words += ["--test-share", "0", "--processes", "1"]
    assert cli.main(words) == 2
    assert "photos/a/0.jpg is not a readable image" in capsys.readouterr().err
    assert cli.main([*words, "--skip-broken", "--shard-size", "1MB"]) == 0
    told = capsys.readouterr().err
    assert "32x32, 1 classes, images: 2 train" in told
    assert "1 unreadable images left out:" in told and "2 images were smaller than the resolution" in told
    assert not (tmp_path / "out" / "extractor.json").exists()  # there is no test split to judge it on


def test_sizes_of_shards():
    sizes = {"256MiB": 2**28, "1GB": 10**9, "1g": 10**9, "2 KiB": 2048, "1.5k": 1500, "77": 77, "77B": 77}
    assert {text: byte_size(text) for text in sizes} == sizes
    for text in ("0", "1TB", "-5", "MiB", ""):
        with pytest.raises(Exception, match="is not a size such as 256MiB"):
            byte_size(text)
