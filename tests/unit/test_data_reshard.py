"""Preparing from shards that other tools have written."""

import json
from pathlib import Path

import pytest
from archives import colour_classes, coloured, read_split, tar_bytes

from data_pipeline.errors import DataError
from data_pipeline.sources.shards import prepare_shards
from data_pipeline.storage import list_url
from data_pipeline.storage.urls import shown


def shards(folder: Path, label_file=lambda label: ("cls", str(label).encode())) -> str:
    """Three shards of four samples whose keys repeat from shard to shard, as many tools write them."""
    for number in range(3):
        members: dict[str, bytes] = {}
        for sample in range(4):
            label = (number + sample) % 3
            suffix, content = label_file(label)
            image = ("jpg", "JPEG", "png", "webp")[sample]
            members[f"./{sample:04d}.{image}"] = coloured(label, image_format=image.upper().replace("JPG", "JPEG"))
            members[f"./{sample:04d}.{suffix}"] = content
            members[f"./{sample:04d}.txt"] = b"a caption"
        (folder / f"other-{number:03d}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/other-{{000..002}}.tar"


def test_class_numbers(tmp_path: Path):
    description = prepare_shards(shards(tmp_path), str(tmp_path / "out"), 16)
    assert description.classes == ["0", "1", "2"] and list(description.splits) == ["train"]
    images, labels, keys = read_split(tmp_path / "out", "train")
    assert colour_classes(images) == labels and len(labels) == len(set(keys)) == 12


def test_words_in_json(tmp_path: Path):
    names = ["ash", "birch", "cedar"]
    source = shards(tmp_path, lambda label: ("json", json.dumps({"tree": names[label], "label": 9}).encode()))
    description = prepare_shards(source, str(tmp_path / "out"), 16, label_key="tree", test_share=0.25)
    assert description.classes == names and description.splits["test"].samples == 3
    images, labels, _ = read_split(tmp_path / "out", "test")
    assert colour_classes(images) == labels


def test_one_class_where_there_are_no_labels(tmp_path: Path):
    source = shards(tmp_path, lambda label: ("text", b"a caption"))
    with pytest.raises(DataError, match=r"other-000\.tar: sample './0000' has no label .* give --label-key, or"):
        prepare_shards(source, str(tmp_path / "out"), 16)
    assert len(prepare_shards(source, str(tmp_path / "out"), 16, unlabelled=True).classes) == 1


def test_our_own_shards_are_a_source_too(tmp_path: Path):
    prepare_shards(shards(tmp_path), str(tmp_path / "a"), 16)
    prepare_shards(f"{tmp_path}/a/train-000000.tar", str(tmp_path / "b"), 16)
    first, second = (read_split(tmp_path / name, "train") for name in "ab")
    by_key = dict(zip(first[2], first[0].tolist(), strict=True))
    assert [by_key[key] for key in second[2]] == second[0].tolist()


def test_lists_of_shards():
    assert list_url("a-{0..2}.tar::b.tar") == ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar"]
    mistakes = {"a-{0..2.tar": "braces that name no list", "a.tar::a.tar": "an object twice", "::a": "an empty URL"}
    for source, message in mistakes.items():
        with pytest.raises(DataError, match=message):
            list_url(source)
    with pytest.raises(DataError, match="names more than 100,000 objects"):
        list_url("a-{0..9999999}.tar")


def test_secrets_of_urls_are_not_recorded():
    source = "https://me:pw@host/a-{0..2}.tar?X-Amz-Signature=abc::s3://bucket/b.tar::c@d.tar"
    assert shown(source) == "https://host/a-{0..2}.tar::s3://bucket/b.tar::c@d.tar"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no samples"),
        ({"a.cls": b"1"}, "sample 'a' holds no image"),
        ({"a.jpg": b"", "a.png": b"", "a.cls": b"1"}, "sample 'a' holds several images"),
        ({"a.jpg": b"", "a.cls": b"cat"}, "sample 'a' has no label"),
        ({"a.jpg": b"", "a.json": b"[" * 100_000}, "sample 'a' has no label"),
        ({"a.jpg": b"", "a.json": b'{"label": 1.5}'}, "neither a whole number nor a word"),
        ({"a.jpg": b"", "a.cls": b"-1"}, "class numbers start at 0"),
        ({"a.jpg": b"", "a.cls": b"99999999999"}, "class numbers start at 0"),
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.json": b'{"label": "x"}'}, "both numbers and words"),
        ({"a.jpg": b"", "a.cls": b"1" * 2**21}, "too many for a label"),
        ({"a.jpg": b"no image", "a.cls": b"1"}, r"s\.tar: a\.jpg is not a readable image"),
    ],
)
def test_other_shards_are_refused(tmp_path: Path, members: dict[str, bytes], message: str):
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataError, match=message):
        prepare_shards(str(tmp_path / "s.tar"), str(tmp_path / "out"), 16)


def test_damaged_shards_are_named(tmp_path: Path):
    source = shards(tmp_path)
    path = tmp_path / "other-001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"other-001\.tar (was cut short|is damaged)"):
        prepare_shards(source, str(tmp_path / "out"), 16)
    path.write_bytes(b"hello" * 300)
    with pytest.raises(DataError, match=r"other-001\.tar is damaged or not a tar"):
        prepare_shards(source, str(tmp_path / "out"), 16)
    path.unlink()
    with pytest.raises(DataError, match=r"other-001\.tar does not exist"):
        prepare_shards(source, str(tmp_path / "out"), 16)
