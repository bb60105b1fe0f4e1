"""A bucket: SCTRAIN_TEST_S3_URL=s3://bucket/prefix with AWS_* variables names the one to test against."""

import io
import os
import random
import uuid

import pytest

from data_pipeline import storage
from data_pipeline.errors import DataError, MissingError
from data_pipeline.storage import exists, join_url, list_url, open_url, read_range, read_ranges, size_of, write_object

BASE = os.environ.get("SCTRAIN_TEST_S3_URL", "")
pytestmark = pytest.mark.skipif(not BASE, reason="SCTRAIN_TEST_S3_URL names no bucket to test against")
BIG = random.Random(4).randbytes(20_000_000)  # two parts of a multipart upload


@pytest.fixture(scope="module")
def folder() -> str:
    folder = join_url(BASE, uuid.uuid4().hex)
    write_object(join_url(folder, "big.tar"), io.BytesIO(BIG))
    return folder


def test_objects_are_written_listed_and_read(folder: str):
    names = ("a b%+é.json", "empty", "sub/x")
    assert list_url(join_url(folder, "names")) == []
    for name in names:
        write_object(join_url(folder, f"names/{name}"), name.encode() if name != "empty" else b"")
    assert list_url(join_url(folder, "names/")) == [join_url(folder, f"names/{name}") for name in (*names[:2], "sub")]
    for name in names:
        url = join_url(folder, f"names/{name}")
        assert exists(url) and open_url(url).read() == (name.encode() if name != "empty" else b"")
    assert list_url(url) == [url] and not exists(join_url(folder, "names/sub"))


def test_ranges(folder: str):
    url = join_url(folder, "big.tar")
    choose = random.Random(5)
    ranges = [(choose.randrange(len(BIG) - 16384), 16384) for _ in range(20)]
    assert read_ranges(url, ranges) == [BIG[offset : offset + size] for offset, size in ranges]
    assert size_of(url) == len(BIG) and open_url(url).read() == BIG


def test_what_is_written_anew_is_read_anew(folder: str):
    url = join_url(folder, "twice")
    for content in (b"one", b"three"):
        write_object(url, content)
        assert open_url(url).read() == content


def test_what_is_lost_or_cut_short(folder: str):
    with pytest.raises(MissingError, match="does not exist, HTTP 404"):
        size_of(join_url(folder, "none"))
    with pytest.raises(MissingError, match="ends before byte 20000001"):
        read_range(join_url(folder, "big.tar"), len(BIG) - 1, 2)


def test_wrong_keys_are_told_without_being_shown(folder: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    storage.configure(storage.StorageSettings())
    try:
        for use in (lambda: size_of(join_url(folder, "big.tar")), lambda: write_object(join_url(folder, "x"), b"x")):
            with pytest.raises(DataError, match=r"access denied, HTTP 403.*AWS_ACCESS_KEY_ID") as caught:
                use()
            assert "hush" not in str(caught.value) and os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value)
    finally:
        monkeypatch.undo()
        storage.configure(storage.StorageSettings())
