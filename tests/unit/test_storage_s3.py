"""A bucket: SCTRAIN_TEST_S3_URL=s3://bucket/prefix with AWS_* variables names the one to test against."""

import io
import os
import random
from collections.abc import Iterator

import pytest
from bucket import BASE, bucket_folder

from data_pipeline import storage
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError, MissingError
from data_pipeline.generated import write_latents
from data_pipeline.storage import (
    delete,
    exists,
    join_url,
    list_url,
    open_url,
    read_range,
    read_ranges,
    size_of,
    sizes_in,
    statistics,
    write_object,
)

pytestmark = pytest.mark.skipif(not BASE, reason="SCTRAIN_TEST_S3_URL names no bucket to test against")
BIG = random.Random(4).randbytes(20_000_000)  # two parts of a multipart upload


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    with bucket_folder() as folder:
        write_object(join_url(folder, "big.tar"), io.BytesIO(BIG))
        yield folder


def test_objects_are_written_listed_and_read(folder: str):
    names = ("a b%+é.json", "empty", "sub/x")
    assert list_url(join_url(folder, "names")) == []
    for name in names:
        write_object(join_url(folder, f"names/{name}"), name.encode() if name != "empty" else b"")
    assert list_url(join_url(folder, "names/")) == [join_url(folder, f"names/{name}") for name in (*names[:2], "sub")]
    for name in names:
        url = join_url(folder, f"names/{name}")
        assert exists(url) and open_url(url).read() == (name.encode() if name != "empty" else b"")
        assert list_url(url) == [url]
    assert not exists(join_url(folder, "names/sub"))


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


def test_what_is_deleted_is_gone(folder: str):
    urls = [join_url(folder, f"gone/{number}") for number in range(5)]
    for url in urls:
        write_object(url, url.encode())
    assert sizes_in(join_url(folder, "gone")) == {str(number): len(url) for number, url in enumerate(urls)}
    before = statistics()["requests"]
    delete([*urls[:4], join_url(folder, "gone/none")])
    assert statistics()["requests"] - before == 1
    assert list_url(join_url(folder, "gone")) == urls[4:] and not exists(urls[0])
    with pytest.raises(MissingError, match="does not exist, HTTP 404"):
        read_range(urls[0], 0, 1)


def test_all_shards_are_compared_with_one_list(folder: str):
    url = join_url(folder, "latents")
    write_latents(url, 24, 12)
    before = statistics()["requests"]
    dataset = open_dataset(url, "train")
    assert statistics()["requests"] - before <= 7 < len(dataset.shard_urls)  # two looks and the bytes of two objects
    write_object(join_url(url, "train-000003.tar"), b"another")
    with pytest.raises(DataError, match=r"train-000003\.tar holds 7 bytes where \d"):
        open_dataset(url, "train")
    delete([join_url(url, "train-000002.tar")])
    with pytest.raises(MissingError, match=r"train-000002\.tar does not exist"):
        open_dataset(url, "train")
    assert len(open_dataset(url, "train", tolerate_loss=True)) == 24
