"""Damage and mistakes met while reading: always one sentence with the file and the mend."""

import io
import json
import os
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import BadSampleError, decode_sample, encode_npy, encode_png
from data_pipeline.digits import prepare_digits
from data_pipeline.errors import DataError
from data_pipeline.loader import open_dataset
from data_pipeline.storage import join_url, open_url, read_range


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder)
    return folder


@pytest.fixture
def digits(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "digits")


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def message(caught: pytest.ExceptionInfo[DataError]) -> str:
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_every_byte_of_a_sample_is_protected(digits: Path):
    dataset = open_dataset(str(digits), "train")
    shard, offset = digits / dataset.index.shard_name(5), int(dataset.index.offset[5])
    for place in (offset, offset + 600, offset + int(dataset.index.size[5]) - 1):  # header, content, padding
        flip_byte(shard, place)
        with pytest.raises(DataError) as caught:
            dataset.read(np.arange(10))
        text = message(caught)
        assert shard.name in text and dataset.index.key[5].decode() in text and "`sctrain prepare` again" in text
        flip_byte(shard, place)
    dataset.read(np.arange(10))


def test_shards_missing_or_cut_short(digits: Path):
    dataset = open_dataset(str(digits), "train")
    os.truncate(digits / "train-000001.tar", 1024)
    with pytest.raises(DataError, match=r"train-000001\.tar ends before byte .*`sctrain prepare` again"):
        dataset.read(np.array([300]))
    with pytest.raises(DataError, match=r"train-000001\.tar holds 1,024 bytes"):
        open_dataset(str(digits), "train")
    (digits / "train-000001.tar").unlink()
    (digits / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar does not exist: .*`sctrain prepare` again"):
        dataset.read(np.array([600]))
    with pytest.raises(DataError, match=r"train-000001\.tar does not exist"):
        open_dataset(str(digits), "train")


@pytest.mark.parametrize(("column", "value"), [("label", 3), ("key", b"digit-9999")])
def test_shard_and_index_must_agree(original: Path, column: str, value: object):
    dataset = open_dataset(str(original), "train")
    values = getattr(dataset.index, column).copy()
    row = int(np.flatnonzero(values != value)[0])
    values[row] = value
    lying = replace(dataset, index=replace(dataset.index, **{column: values}))
    with pytest.raises(
        DataError, match=r"train-000000\.tar: sample .* is damaged \(the shard says 'digit-\d+' of class \d"
    ):
        lying.read(np.array([row]))


def test_index_of_another_data_set(digits: Path):
    shutil.copy(digits / "index-test.npz", digits / "index-train.npz")
    with pytest.raises(DataError, match=r"index-train\.npz is not the index that dataset\.json describes"):
        open_dataset(str(digits), "train")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unknown": 1}, "unknown"),
        ({"channels": 2}, "channels"),
        ({"height": "8"}, "height"),
        ({"mean": [0.5, 0.5]}, "one value per channel"),
        ({"format": "sctrain-shards-9"}, "format"),
        ({"splits": {}}, "no split called train"),
        ({"height": 2**30}, "more than a sample can have"),
        ({"mean": [1.5]}, "between 0 and 1"),
        ({"latents": {"encoder": "vae", "dtype": "object", "content": "mean", "convention": ""}}, "latents.dtype"),
        ({"splits": {"train": {"samples": 1, "index": "../i.npz", "fingerprint": "0" * 64}}}, "plain file name"),
    ],
)
def test_description_is_validated(digits: Path, change: dict[str, object], reason: str):
    content = json.loads((digits / "dataset.json").read_text()) | change
    (digits / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        open_dataset(str(digits), "train")
    text = message(caught)
    assert "dataset.json is not a valid description" in text and reason in text


def test_wrong_places(digits: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"ftp://bucket/digits/dataset\.json has an unknown scheme: use a path"):
        open_dataset("ftp://bucket/digits", "train")
    with pytest.raises(DataError, match=r"nowhere/dataset\.json does not exist: check the path"):
        open_dataset(str(tmp_path / "nowhere"), "train")
    with pytest.raises(DataError, match="has no split 'valid': choose one of test, train"):
        open_dataset(str(digits), "valid")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        open_url(str(digits))


def test_file_urls_are_paths(digits: Path, tmp_path: Path):
    spaced = shutil.copytree(digits, tmp_path / "two words")
    dataset = open_dataset(spaced.as_uri(), "test")  # two%20words
    assert len(dataset) == 359 and dataset.read(np.array([358, 0]))[0].shape == (2, 1, 8, 8)
    assert read_range(join_url(spaced.as_uri() + "/", "dataset.json"), 0, 1) == b"{"


def test_a_lost_shard_is_tolerated_where_asked(digits: Path):
    (digits / "train-000001.tar").unlink()
    dataset = open_dataset(str(digits), "train", tolerate_loss=True)
    with pytest.raises(DataError, match=r"train-000001\.tar does not exist"):
        dataset.read(np.array([0, 300]))
    assert dataset.read(np.array([0]))[0].shape == (1, 1, 8, 8)


def tar_of(**members: bytes) -> bytes:
    """A tar without end marker; member names are given as key__suffix."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    return buffer.getvalue()[:end]


PNG = encode_png(np.zeros((1, 8, 8), np.uint8))
SHORT_PNG = PNG[:45]


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 128).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tar_of(a__pkl=b"\x80\x04.", a__cls=b"1"), "one image"),
        (tar_of(a__png=PNG, a__cls=b"1", a__pyd=b"\x80\x04."), "one image"),
        (tar_of(a__png=PNG), "one image"),
        (tar_of(a__png=PNG, b__cls=b"1"), "one image"),
        (tar_of(a__png=PNG, a__cls=b"-1"), "class number"),
        (tar_of(a__png=PNG, a__cls=b"9" * 5000), "class number"),
        (tar_of(a__png=PNG, a__cls=b"1")[:-512], "plain files"),
        (b"\x01" * 1024, "tar members"),
        (b"", "one image"),
        (tar_of(a__png=SHORT_PNG, a__cls=b"1"), "cannot be decoded"),
        (tar_of(a__png=b"GIF89a", a__cls=b"1"), "cannot be decoded"),
        (tar_of(a__png=jpeg(), a__cls=b"1"), "cannot be decoded"),  # the suffix decides the decoder
        (tar_of(a__png=encode_png(np.zeros((1, 8, 9), np.uint8)), a__cls=b"1"), "9x8, not 8x8"),
        (tar_of(a__png=encode_png(np.zeros((3, 8, 8), np.uint8)), a__cls=b"1"), "RGB"),
    ],
)
def test_samples_that_are_none(data: bytes, reason: str):
    with pytest.raises(BadSampleError, match=reason):
        decode_sample(data, zlib.crc32(data), (1, 8, 8))


LATENT = np.arange(4 * 8 * 8, dtype=np.float16).reshape(4, 8, 8)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


def with_header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + LATENT.tobytes()


@pytest.mark.parametrize(
    "encoded",
    [encode_npy(LATENT), npy(LATENT, (2, 0)), with_header(b"{'descr':'<f2','fortran_order':False,'shape':(4,8,8)}\n")],
    ids=["ours", "version 2", "other spelling"],
)
def test_latents_decode(encoded: bytes):
    data = tar_of(a__npy=encoded, a__cls=b"7")
    key, array, label = decode_sample(data, zlib.crc32(data), (4, 8, 8), "float16")
    assert (key, label) == ("a", 7) and array.dtype == np.float16 and np.array_equal(array, LATENT)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (npy(LATENT.astype(np.float32)), r"<f4 \(4, 8, 8\), not <f2"),
        (npy(LATENT.astype(">f2")), ">f2 .*, not <f2"),
        (npy(LATENT[:3]), r"\(3, 8, 8\), not <f2 \(4, 8, 8\)"),
        (npy(np.asfortranarray(LATENT)), "in columns, not <f2"),
        (npy(np.array([{}], dtype=object)), "cannot be decoded"),
        (encode_npy(LATENT)[:-2], "cut short"),
        (encode_npy(LATENT) + b"\0", "followed by something"),
        (with_header(b"{'descr': '<f2', 'fortran_order': False, 'shape': (10**12,)}\n"), "cannot be decoded"),
        (
            with_header(b"{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
            "1000000000000,.*not <f2",
        ),
        (with_header(b"__import__('os').system('false')\n"), "cannot be decoded"),
        (with_header(b"(" * 3000), "cannot be decoded"),
        (b"\x93NUMPY\x09\x00", "cannot be decoded"),
        (b"PK\x03\x04", "cannot be decoded"),
        (b"", "cannot be decoded"),
    ],
)
def test_arrays_that_are_none(encoded: bytes, reason: str):
    data = tar_of(a__npy=encoded, a__cls=b"1")
    with pytest.raises(BadSampleError, match=reason):
        decode_sample(data, zlib.crc32(data), (4, 8, 8), "float16")


def test_pictures_and_latents_are_not_confused():
    for data, latent in (
        (tar_of(a__npy=encode_npy(LATENT), a__cls=b"1"), None),
        (tar_of(a__png=PNG, a__cls=b"1"), "float16"),
    ):
        with pytest.raises(BadSampleError, match=r"it holds a \.(npy|png), which is not what dataset.json describes"):
            decode_sample(data, zlib.crc32(data), (1, 8, 8), latent)


def test_other_image_formats_decode():
    data = tar_of(a__jpg=jpeg(), a__cls=b"7")
    key, image, label = decode_sample(data, zlib.crc32(data), (1, 8, 8))
    assert (key, label) == ("a", 7) and image.shape == (1, 8, 8) and abs(int(image.mean()) - 128) <= 1
