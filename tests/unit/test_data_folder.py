"""Preparing a directory of class folders of ordinary image files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.pictures import Transform
from data_pipeline.shards import Bar, Job, quiet
from data_pipeline.sources.folder import prepare_folder


def save(path: Path, image: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load(path: Path, resolution: int, channels: int) -> np.ndarray:
    return Transform(resolution, channels, as_photo=True)(path.read_bytes(), str(path))[0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes whose colour tells them apart, in several formats and sizes."""
    for number, suffix in enumerate(["png", "jpg", "webp", "bmp", "JPEG", "gif"]):
        save(tmp_path / "photos" / "red" / f"r{number}.{suffix}", Image.new("RGB", (20 + number, 16), (250, 0, 0)))
        save(tmp_path / "photos" / "blue" / "more" / f"b{number}.{suffix}", Image.new("RGB", (16, 40), (0, 0, 250)))
    (tmp_path / "photos" / "red" / ".DS_Store").write_bytes(b"not an image")
    return tmp_path / "photos"


def test_folder_becomes_a_data_set(photos: Path, tmp_path: Path):
    seen = []

    def progress(split: str, total: int, done: int) -> Bar:
        seen.append((split, total, done))
        return quiet(split, total, done)

    description = prepare_folder(photos, tmp_path / "out", 8, test_share=0.3, job=Job(progress=progress))
    assert description.classes == ["blue", "red"] and description.shape == (3, 8, 8) and description.name == "photos"
    assert seen == [("train", 8, 0), ("test", 4, 0)]  # per class: 4 for training, 2 for test
    for split in ("train", "test"):
        dataset = open_dataset(str(tmp_path / "out"), split)
        images, labels = dataset.read(np.arange(len(dataset)))
        assert labels.sum() == len(dataset) / 2
        strongest = images.float().mean(dim=(2, 3)).argmax(dim=1)  # channel 0 is red, 2 is blue
        assert (strongest == 2 - 2 * labels).all()


def test_same_source_gives_the_same_bytes_and_another_is_noticed(photos: Path, tmp_path: Path):
    first, second = prepare_folder(photos, tmp_path / "a", 8), prepare_folder(photos, tmp_path / "b", 8)
    assert first == second
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert prepare_folder(photos, tmp_path / "a", 8) == first
    with pytest.raises(DataError, match=r"another data set \(resolution 8 instead of 16\): choose another folder"):
        prepare_folder(photos, tmp_path / "a", 16)
    save(photos / "red" / "new.png", Image.new("RGB", (9, 9)))
    with pytest.raises(DataError, match=r"holds another data set \(files"):
        prepare_folder(photos, tmp_path / "a", 8)


def test_gray_only_where_every_image_is_gray(tmp_path: Path):
    for number in range(3):
        save(tmp_path / "scans" / "x" / f"{number}.png", Image.new("L", (8, 8), 100 * number))
    assert prepare_folder(tmp_path / "scans", tmp_path / "gray", 8).channels == 1
    save(tmp_path / "scans" / "x" / "colour.png", Image.new("RGB", (8, 8)))
    assert prepare_folder(tmp_path / "scans", tmp_path / "rgb", 8).channels == 3


def test_central_square_is_resized_with_antialiasing(tmp_path: Path):
    columns = np.zeros((32, 96), np.uint8)
    columns[:, 32:64:2] = 200  # stripes one pixel wide in the central square only
    columns[:, :32] = columns[:, 64:] = 255
    Image.fromarray(columns).save(tmp_path / "stripes.png")
    image = load(tmp_path / "stripes.png", 4, channels=1)
    assert image.shape == (1, 4, 4) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - 100).max() <= 20  # without antialiasing: 0 or 200; without the crop: up to 255


def test_orientation_and_transparency(tmp_path: Path):
    half = Image.new("RGB", (8, 8))
    half.paste((255, 255, 255), (0, 0, 4, 8))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise, which puts the left half on top
    half.save(tmp_path / "turned.png", exif=exif)
    upright = load(tmp_path / "turned.png", 8, channels=3)
    assert upright[:, 0].min() == 255 and upright[:, 7].max() == 0
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert load(tmp_path / "clear.png", 8, channels=3).min() == 255


def test_mistakes_are_named(photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="nowhere is not a folder"):
        prepare_folder(tmp_path / "nowhere", out, 8)
    with pytest.raises(DataError, match="lies inside the source folder"):
        prepare_folder(photos, photos / "out", 8)
    with pytest.raises(DataError, match="resolution is 0"):
        prepare_folder(photos, out, 0)
    with pytest.raises(DataError, match="test_share is 1"):
        prepare_folder(photos, out, 8, test_share=1)
    with pytest.raises(DataError, match="more holds no class folders"):
        prepare_folder(photos / "blue" / "more", out, 8)
    (photos / "green").mkdir()
    with pytest.raises(DataError, match="green holds no image"):
        prepare_folder(photos, out, 8)
    save(photos / "green" / "g.png", Image.new("RGB", (8, 8)))
    with pytest.raises(DataError, match="green holds one image"):
        prepare_folder(photos, out, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize("kind", ["text", "cut", "deep"])
def test_unreadable_image_is_named(photos: Path, tmp_path: Path, kind: str):
    path = photos / "red" / "bad.png"
    if kind == "deep":
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    else:
        save(path, Image.effect_noise((64, 64), 50))
        path.write_bytes(b"hello" if kind == "text" else path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"red/bad\.png (is not a readable image|has pixels of type)"):
        prepare_folder(photos, tmp_path / "out", 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
