"""Latents: what is written of images, how it goes on, what comes out of the decoder, and that conventions never mix."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from auto_encoder import write_auto_encoder
from diffusers import AutoencoderKL
from PIL import Image
from preparing import Interrupt, content, stopping_after, write_photos

from data_pipeline.dataset import open_dataset
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.generated import write_latents
from data_pipeline.latents import CONVENTIONS, ConventionName, LatentOutput
from data_pipeline.shards import Job
from data_pipeline.sources.folder import prepare_folder
from sctrain.building import model_space
from sctrain.cli import main
from sctrain.config.loading import load
from sctrain.errors import UserError
from sctrain.latents import LatentSpace
from sctrain.vae import Vae, load_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_auto_encoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def vae(folder: Path) -> Vae:
    return load_vae(folder, "scm")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("source") / "photos")


def output(vae: Vae, *, flip_variant: bool = False) -> Output:
    return Output(samples_per_shard=5, latents=LatentOutput(vae, flip_variant))


@pytest.fixture(scope="module")
def whole(vae: Vae, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("whole") / "latents"
    prepare_folder(photos, dest, 16, test_share=0.2, output=output(vae, flip_variant=True))
    return dest


@pytest.mark.parametrize("convention", ["scm", "edm2"])
def test_the_encoder_sees_the_range_of_its_convention(folder: Path, convention: ConventionName):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
    model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    pixels = torch.from_numpy(images).float() / 255
    with torch.no_grad():
        expected = model.encode(pixels if convention == "edm2" else pixels * 2 - 1).latent_dist
    mean, std = np.split(load_vae(folder, convention).encode(images), 2, axis=1)
    np.testing.assert_allclose(mean, expected.mean.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, expected.std.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("convention", ["scm", "edm2"])
def test_decoded_pixels_undo_the_range(folder: Path, convention: ConventionName):
    latents = torch.randn(2, 4, 8, 8)
    model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        seen = model.decode(latents).sample
    expected = (seen if convention == "edm2" else (seen + 1) / 2) * 255
    decoded = load_vae(folder, convention).decode(latents)
    assert decoded.dtype == torch.uint8 and decoded.float().std() > 1
    assert (decoded.float() - expected.clamp(0, 255)).abs().max() <= 0.51


def test_what_is_written(whole: Path, vae: Vae):
    train = open_dataset(str(whole), "train")
    about = train.description
    assert about.latents is not None and about.latents.content == "mean_std"
    assert (about.latents.convention, about.latents.encoder, about.shape) == ("scm", vae.identity, (4, 8, 8))
    assert {"torch", "diffusers"} <= about.software.keys()
    keys = [key.decode() for key in train.index.key.tolist()]
    assert len(keys) == 36 and len(open_dataset(str(whole), "test")) == 4  # of 22 images
    assert sum(key.endswith("-mirrored") for key in keys) == 18
    ids = np.arange(len(train))
    means, _ = train.read(ids)
    stored = train.decode(ids, train._fetcher.read(ids), train._fetcher)[0]
    second = (stored[:, :4] ** 2 + stored[:, 4:] ** 2).astype(np.float64).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(about.mean, means.double().mean(dim=(0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(about.std, np.sqrt(second - np.square(about.mean)), rtol=1e-3)


def test_the_variant_is_of_the_mirrored_image(whole: Path, vae: Vae, photos: Path):
    train = open_dataset(str(whole), "train")
    keys = [key.decode() for key in train.index.key.tolist()]
    name = next(key for key in keys if not key.endswith("-mirrored"))
    means, _ = train.read(np.array([keys.index(name), keys.index(f"{name}-mirrored")]))
    plain = prepare_pixels(photos, whole.parent / "pixels", name)
    expected = vae.encode(np.stack([plain, plain[:, :, ::-1]]))[:, :4]
    np.testing.assert_allclose(means, expected, atol=1e-4)
    assert (means[0].flip(-1) - means[1]).abs().max() > 1e-2, "not the mirrored latents"


def prepare_pixels(photos: Path, dest: Path, key: str) -> np.ndarray:
    prepare_folder(photos, dest, 16, test_share=0.2)
    dataset = open_dataset(str(dest), "train")
    keys = [name.decode() for name in dataset.index.key.tolist()]
    return dataset.read(np.array([keys.index(key)]))[0][0].numpy()


def test_interrupted_and_with_processes_the_bytes_are_the_same(vae: Vae, photos: Path, whole: Path, tmp_path: Path):
    written = output(vae, flip_variant=True)
    with pytest.raises(Interrupt):
        prepare_folder(photos, tmp_path / "out", 16, test_share=0.2, output=written, job=stopping_after(13))
    assert list((tmp_path / ".out.partial" / "data").glob("*.tar")), "something is there to go on with"
    prepare_folder(photos, tmp_path / "out", 16, test_share=0.2, output=written, job=Job(processes=2))
    assert content(tmp_path / "out") == content(whole)


def test_other_flags_are_another_data_set(folder: Path, photos: Path, whole: Path):
    with pytest.raises(DataError, match=r"convention scm instead of edm2"):
        prepare_folder(photos, whole, 16, test_share=0.2, output=output(load_vae(folder, "edm2"), flip_variant=True))


def test_gray_images_are_refused(vae: Vae, tmp_path: Path):
    for number in range(4):
        path = tmp_path / "gray" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), number).save(path)
    with pytest.raises(DataError, match=r"these are gray"):
        prepare_folder(tmp_path / "gray", tmp_path / "out", 16, output=output(vae))


def test_the_command(folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dest, flags = str(tmp_path / "out"), ["--resolution", "16", "--processes", "1"]
    assert main(["prepare", "folder", str(photos), dest, *flags, "--encode", "vae"]) == 2
    assert "--encode vae needs --vae" in capsys.readouterr().err
    assert main(["prepare", "folder", str(photos), dest, *flags, "--vae", str(folder)]) == 2
    assert "add --encode vae" in capsys.readouterr().err
    encode = ["--encode", "vae", "--vae", str(folder), "--latent-type", "float16", "--verify"]
    assert main(["prepare", "folder", str(photos), dest, *flags, *encode]) == 0
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["latents"]["dtype"] == "float16" and about["latents"]["convention"] == "scm"


def test_a_missing_or_foreign_folder_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no config.json: download sd-vae-ft-mse"):
        load_vae(tmp_path, "scm")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model.safetensors"):
        load_vae(tmp_path, "scm")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"holds a UNet2DModel"):
        load_vae(tmp_path, "scm")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"holds no auto-encoder that can be read"):
        load_vae(tmp_path, "scm")
    write_auto_encoder(tmp_path / "wide", channels=16)
    with pytest.raises(UserError, match=r"latents of 16 channels"):
        load_vae(tmp_path / "wide", "scm")


def test_a_missing_package_is_named_with_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = builtins.__import__

    def without_diffusers(name: str, *arguments):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'")
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(UserError, match=r"pip install 'sctrain\[vae\]'"):
        load_vae(folder, "scm")


def config(url: Path | str, *overrides: str):
    return load("imagenet512/trigflow-s.yaml", [f"data.url={url}", *overrides])


def test_a_convention_gives_mean_and_std_and_no_others():
    data = config("x").data
    assert (data.mean, data.std) == (CONVENTIONS["scm"].mean, CONVENTIONS["scm"].std)
    with pytest.raises(UserError, match=r"mean .* is not that of latents scm"):
        config("x", "data.mean=[5.81, 3.25, 0.12, -2.15]")
    assert config("x", "data.latents=edm2").data.std == CONVENTIONS["edm2"].std


def test_data_of_another_convention_are_refused(whole: Path, photos: Path, tmp_path: Path):
    about = open_dataset(str(whole), "train").description
    space = model_space(config(whole), about)
    assert isinstance(space, LatentSpace) and space.convention == "scm"
    with pytest.raises(UserError, match=r"convention scm, this run has data.latents edm2: set it to scm"):
        model_space(config(whole, "data.latents=edm2"), about)
    with pytest.raises(UserError, match=r"this run has data.latents none"):
        model_space(config(whole, "data.latents=null", "data.mean=[1]", "data.std=[1]"), about)
    write_latents(str(tmp_path / "random"), 8, 1)
    about = open_dataset(str(tmp_path / "random"), "train").description
    with pytest.raises(UserError, match=r"latents of convention 'random numbers', not scm"):
        model_space(config(tmp_path / "random"), about)
    prepare_folder(photos, tmp_path / "pixels", 16)
    about = open_dataset(str(tmp_path / "pixels"), "train").description
    with pytest.raises(UserError, match=r"holds images: remove it"):
        model_space(config(tmp_path / "pixels"), about)


def test_the_space_of_latents_draws_pictures(whole: Path, folder: Path, vae: Vae):
    about = open_dataset(str(whole), "train").description
    latents = torch.randn(2, 4, 8, 8)
    space = model_space(config(whole, f"data.vae={folder}"), about)
    x = space.from_pixels(latents)
    assert torch.equal(
        space.to_pixels(x),
        vae.decode(x * torch.tensor(space.std).reshape(-1, 1, 1) / 0.5 + torch.tensor(space.mean).reshape(-1, 1, 1)),
    )
    with pytest.raises(UserError, match=r"give --vae, or set 'data.vae'"):
        model_space(config(whole), about).to_pixels(x)
