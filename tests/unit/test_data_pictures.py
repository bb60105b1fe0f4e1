"""Pixels of image files, and the files that pixels become."""

import gc
import io
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from archives import coloured, read_split
from PIL import Image

from data_pipeline.decode import IMAGE_FORMATS, decode_image
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.pictures import SUFFIXES, Transform, UnreadableImageError, center_crop, encode
from data_pipeline.sources.folder import prepare_folder


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def published_crop(image: Image.Image, side: int) -> np.ndarray:
    """guided-diffusion, image_datasets.py: center_crop_arr, which works on arrays."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(length // 2 for length in image.size), resample=Image.Resampling.BOX)
    scale = side / min(*image.size)
    image = image.resize(tuple(round(length * scale) for length in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[y : y + side, x : x + side]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (63, 64), (31, 200), (129, 128), (1025, 333)])
@pytest.mark.parametrize("side", [32, 64])
def test_crop_is_that_of_adm(size: tuple[int, int], side: int):
    image = noise(*size)
    assert np.array_equal(np.array(center_crop(image, side, "x")), published_crop(image, side))


def test_strips_do_not_fill_the_memory():
    with pytest.raises(UnreadableImageError, match=r"strip\.png is 100000x1 pixels, too long a strip for 512x512"):
        center_crop(Image.new("L", (100_000, 1)), 512, "strip.png")


def test_enlarged_images_are_told_apart():
    buffer = io.BytesIO()
    noise(40, 20).save(buffer, format="PNG")
    for side, enlarged in ((21, True), (20, False), (8, False)):
        pixels, found = Transform(side, 3)(buffer.getvalue(), "x")
        assert pixels.shape == (3, side, side) and found == enlarged


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_encoded_images_are_read_back(image_format: str):
    smooth = np.linspace(0, 255, 32)[None, :, None] * np.ones((3, 1, 32))
    pixels = smooth.astype(np.uint8)
    data = encode(pixels, image_format, 95)
    assert data == encode(pixels, image_format, 95)
    back = decode_image(data, IMAGE_FORMATS[SUFFIXES[image_format]], (3, 32, 32))
    assert np.abs(back.astype(int) - pixels).max() <= (0 if image_format == "png" else 8)
    if image_format != "png":
        assert len(encode(pixels, image_format, 5)) < len(data)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its shards to the collector
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_plain_webdataset_decodes_the_shards(image_format: str, tmp_path: Path):
    for label, name in enumerate("abc"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(coloured(label, 30 + number))
    output = Output(image_format=image_format, samples_per_shard=5)
    about = prepare_folder(tmp_path / "photos", tmp_path / "out", 16, test_share=0, output=output)
    assert about.recipe["format"] == image_format and ("quality" in about.recipe) == (image_format != "png")
    images, labels, keys = read_split(tmp_path / "out", "train")
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode("pil"))
    gc.collect()
    assert len(shards) == 3 and [sample["__key__"] for sample in samples] == keys
    assert [sample["cls"] for sample in samples] == labels
    for sample, image in zip(samples, images.numpy(), strict=True):
        assert np.array_equal(np.array(sample[SUFFIXES[image_format]]).transpose(2, 0, 1), image)


def test_shards_are_closed_at_their_size(tmp_path: Path):
    for number in range(12):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        noise(32, 32).save(tmp_path / "photos" / "a" / f"{number}.png")
    prepare_folder(tmp_path / "photos", tmp_path / "out", 32, test_share=0, output=Output(shard_bytes=9000))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sizes == [20_480] * 6  # two samples of 5 KB each, and what a tar is filled up with


def test_other_seeds_give_other_orders(tmp_path: Path):
    for number in range(20):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "a" / f"{number:02d}.png").write_bytes(coloured(0, image_format="PNG"))
    keys = []
    for seed in (0, 1):
        prepare_folder(tmp_path / "photos", tmp_path / f"{seed}", 8, test_share=0, output=Output(seed=seed))
        keys.append(read_split(tmp_path / f"{seed}", "train")[2])
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1]) != keys[0]


@pytest.mark.parametrize("output", [Output(quality=0), Output(quality=101), Output(shard_bytes=0), Output(limit=0)])
def test_impossible_outputs_are_refused(output: Output, tmp_path: Path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "x.jpg").write_bytes(coloured(0))
    with pytest.raises(DataError, match=r"quality is|must be 1 or more"):
        prepare_folder(tmp_path / "photos", tmp_path / "out", 8, test_share=0, output=output)
