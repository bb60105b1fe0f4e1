"""`sctrain edit` on tiny published runs with random weights: what it writes, and what it refuses before any compute."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import publish_random
from PIL import Image

from data_pipeline.sources.folder import prepare_folder
from sctrain import cli
from sctrain.commands import edit
from sctrain.commands.edit_inputs import Model
from sctrain.config.schema import RunConfig
from sctrain.editing import given
from sctrain.editing.measurements import colorization, superresolution
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import Method, start_time

CPU = torch.device("cpu")
DRAWS = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return DRAWS.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **keys: object) -> str:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **keys)
    return str(path)


def read(path: Path) -> torch.Tensor:
    """(C, H, W)."""
    with Image.open(path) as image:
        array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gray` (8x8 digits), `colour` (8x8 RGB, one class, mean and std per channel), and other methods on gray."""
    root = tmp_path_factory.mktemp("editing")
    gray = {"url": prepared(root / "gray-data", 10, 8, 8), "mean": [0.4], "std": [0.2]}
    colour = {"url": prepared(root / "colour-data", 1, 8, 8, 3), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    publish_untrained(root / "gray", gray, "sct")
    publish_untrained(root / "colour", colour, "sct")
    publish_untrained(root / "teacher", gray, "trigflow")
    publish_untrained(root / "ctm", gray, "ctm")
    publish_untrained(root / "pd", gray, "pd")
    publish_untrained(root / "lcm", gray, "lcm", ddim_steps=50)
    publish_untrained(root / "near", gray, "cd", sigma_max=4.0)
    publish_untrained(root / "segments", gray, "scd", segments=2)
    return root


def prepared(folder: Path, classes: int, *shape: int) -> str:
    """URL of a data set of noise."""
    for label in range(classes):
        (folder / "files" / f"{label}").mkdir(parents=True)
        for i in range(10):
            save(folder / "files" / f"{label}" / f"{i}.png", pixels(*shape))
    prepare_folder(folder / "files", folder / "shards", 8)
    return str(folder / "shards")


def publish_untrained(run: Path, data: dict[str, object], name: str, **keys: object) -> None:
    """A snapshot of a small network with random weights."""
    network = {"width": 16, "depth": 1, "heads": 2}
    config = {"name": run.name, "run_dir": run, "data": data, "network": network, "objective": {"name": name, **keys}}
    publish_random(RunConfig.model_validate(config | {"batch": {"global_size": 8}, "budget_images": 64}), 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, good and bad."""
    for i in range(3):
        save(tmp_path / f"gray{i}.png", pixels(8, 8))
        save(tmp_path / f"rgb{i}.png", pixels(8, 8, 3))
    save(tmp_path / "small.png", pixels(4, 4))
    save(tmp_path / "wide.png", pixels(8, 12))
    save(tmp_path / "alpha.png", pixels(8, 8, 4))
    save(tmp_path / "palette.png", pixels(8, 8, 3), "P")
    save(tmp_path / "black.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "wide-mask.png", np.full((4, 8), 255, np.uint8))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    save(tmp_path / "mask.png", mask, "1")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "gray0.png").read_bytes()[:70])
    return tmp_path


def test_inpainting_changes_the_masked_pixels_alone(runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    images = [str(folder / f"gray{i}.png") for i in range(3)]
    out = folder / "new" / "grid.png"
    words = ["edit", "inpaint", str(runs / "gray"), *images, "--mask", str(folder / "mask.png"), "--class", "3"]
    assert cli.main([*words, "--steps", "4", "--out", str(out), "--save-each"]) == 0
    said = capsys.readouterr().err
    assert "3 images, 4 network evaluations each" in said and "off by at most 0.00 of 255 levels" in said
    for i, image in enumerate(images):
        before, after = read(Path(image)), read(out.with_name(f"grid-{i}.png"))
        assert after.shape == (1, 8, 8) and torch.equal(after[..., :4], before[..., :4])
        assert not torch.equal(after[..., 4:], before[..., 4:])
    _, height, width = read(out).shape
    assert width > 3 * 64 and 3 * 64 < height < 4 * 64, "three columns; rows before, given and after"


@pytest.mark.parametrize("source", ["rgb", "gray"])
def test_colorize_keeps_the_luminance_of_every_pixel(runs: Path, folder: Path, source: str):
    images = [folder / f"{source}{i}.png" for i in range(2)]
    words = ["edit", "colorize", str(runs / "colour"), *map(str, images), "--steps", "3", "--save-each"]
    assert cli.main([*words, "--out", str(folder / "grid.png")]) == 0
    before = given.gray(torch.stack([read(image) for image in images]))
    after = torch.stack([read(folder / f"grid-{i}.png") for i in range(2)])
    assert colorization().deviation(after.double(), before.double()) < 0.8
    assert (after.float() - before).abs().max() > 20, "colours are generated"


def test_superres_keeps_means_and_takes_pictures_of_both_sizes(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["edit", "superres", str(runs / "gray"), "--factor", "2", "--class", "3", "--steps", "3", "--save-each"]
    for name in ("gray0.png", "small.png"):
        assert cli.main([*words, str(folder / name), "--out", str(folder / "grid.png")]) == 0
        whole, after = read(folder / name)[None], read(folder / "grid-0.png")[None]
        y = given.coarse(whole, 2) if whole.shape[-1] == 8 else given.enlarged(whole, 2)
        assert superresolution(2).deviation(after.double(), y.double()) < 0.8
    assert "network evaluations each" in capsys.readouterr().err


def test_strokes_are_followed_and_denoising_takes_one_evaluation(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    image, out = str(folder / "gray0.png"), folder / "grid.png"
    common = ["--class", "3", "--out", str(out), "--save-each"]
    gray = str(runs / "gray")
    assert cli.main(["edit", "stroke", gray, image, *common]) == 0
    assert cli.main(["edit", "denoise", gray, image, "--sigma", "0.002", *common]) == 0
    said = capsys.readouterr().err
    assert "1 images, 2 network evaluations each" in said and "1 images, one network evaluation each" in said
    levels = (read(folder / "grid-0.png").float() - read(Path(image)).float()).abs().max()
    assert levels <= 4, "at the least noise level a consistency function is nearly the identity"


@pytest.mark.parametrize("run", ["gray", "lcm", "near"])
def test_interpolation_starts_with_the_first_image_of_a_seed(runs: Path, folder: Path, run: str):
    """The one that one step of the sampler draws, from where the run's process ends."""
    words = ["edit", "interpolate", str(runs / run), "--seeds", "5", "6", "--count", "4", "--class", "0"]
    assert cli.main([*words, "--out", str(folder / "grid.png"), "--save-each"]) == 0
    model = Model.of(runs / run)
    generator = Generator.of(model.run, model.images, 0.05, CPU)
    for seed, i in ((5, 0), (6, 3)):
        drawn = generator.draw(Method("consistency", 1), seed, 1, label=0)
        expected = model.space.to_pixels(drawn.x)[0]
        assert (read(folder / f"grid-{i}.png").int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("run", "sigma_max", "sigma_min"),
    [("gray", 79.4, 0.002), ("lcm", 7.303, 0.06723), ("near", 4.0, 0.002), ("ctm", 80.0, 0.002)],
)
def test_noise_levels_end_where_the_process_of_the_run_does(runs: Path, run: str, sigma_max: float, sigma_min: float):
    model = Model.of(runs / run)
    times = model.times(40)
    assert times[0] == start_time(model.config) and 0.5 * math.tan(times[0]) == pytest.approx(sigma_max, rel=1e-3)
    assert len(times) == 40 and all(before > after for before, after in zip(times[:-1], times[1:], strict=True))
    assert 0.5 * math.tan(times[-1]) == pytest.approx(sigma_min, rel=1e-4)
    assert model.times_of([sigma_max * (1 + 5e-4)])[0] <= times[0]


def test_a_network_that_jumps_is_told_to_go_to_the_data(runs: Path):
    model = Model.of(runs / "ctm")
    generator = Generator.of(model.run, model.images, 0.05, CPU)
    u, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.0]), torch.tensor([1, 2])
    with torch.no_grad():
        F, _ = edit.consistency_network(generator)(u, t, labels)
        assert torch.equal(F, generator.network(u, t, labels, None, torch.zeros(2))[0])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("inpaint gray gray9.png --mask mask.png", "there is no file gray9.png; name a PNG or JPEG image"),
        ("inpaint gray gray0.png --mask none.png", "there is no file none.png; name a PNG or JPEG image"),
        ("inpaint gray . --mask mask.png", ". is a folder; name PNG or JPEG images"),
        ("inpaint gray text.png --mask mask.png", "text.png cannot be read as a PNG or JPEG image; convert it to one"),
        ("inpaint gray cut.png --mask mask.png", "cut.png is damaged or cut short; save or copy it again"),
        ("inpaint gray gray0.png wide.png --mask mask.png", "wide.png is 12x8 pixels and must be 8x8 (width x height)"),
        ("inpaint gray gray0.png --mask wide-mask.png", "wide-mask.png is 8x4 pixels and must be 8x8 (width x height)"),
        ("inpaint gray gray0.png --mask black.png", "black.png has no white pixel, so there is nothing to generate"),
        ("inpaint gray gray0.png --mask alpha.png", "alpha.png has transparency; a mask is black where the image is"),
        ("inpaint gray rgb0.png --mask mask.png", "rgb0.png is RGB and must be gray for this model and edit; convert"),
        ("inpaint colour gray0.png --mask mask.png", "gray0.png is gray and must be RGB for this model and edit"),
        ("inpaint colour palette.png --mask mask.png", "palette.png is of Pillow's mode P and must be RGB"),
        ("inpaint colour alpha.png --mask mask.png", "alpha.png has transparency; flatten it onto a background and"),
        ("inpaint gray gray0.png", "the following arguments are required: --mask"),
        ("inpaint gray gray0.png --mask mask.png --steps 0", "argument --steps: '0' is not a whole number of at least"),
        ("colorize gray gray0.png", "gray makes gray images, which have no colours; colorize with a run on RGB images"),
        ("superres gray gray0.png --factor 3", "--factor 3 is not above 1 and a divisor of the model's 8x8 pixels"),
        ("superres gray gray0.png --factor 1", "--factor 1 is not above 1 and a divisor of the model's 8x8 pixels"),
        ("superres gray small.png --factor 4", "small.png is 4x4 pixels and must be 8x8 or 2x2 (width x height)"),
        ("superres gray gray0.png small.png --factor 2", "small.png and gray0.png have different sizes"),
        ("denoise gray gray0.png --sigma 0", "--sigma 0 is not a noise level of gray; choose from 0.002 to 79."),
        ("denoise gray gray0.png --sigma nan", "--sigma nan is not a noise level of gray"),
        ("denoise gray gray0.png --sigma 100", "--sigma 100 is not a noise level of gray"),
        ("denoise lcm gray0.png --sigma 20", "--sigma 20 is not a noise level of lcm; choose from 0.067"),
        ("denoise lcm gray0.png --sigma 0.01", "--sigma 0.01 is not a noise level of lcm; choose from 0.067"),
        ("stroke gray gray0.png --sigma 1 2", "--sigma 1 2 does not descend; sort the levels"),
        ("interpolate gray --seeds 1 1", "--seeds 1 1 are the same noise"),
        ("stroke teacher gray0.png", "teacher is a diffusion model; edit with a consistency model"),
        ("stroke pd gray0.png", "pd was trained by 'pd', which has no consistency function; edit with another"),
        ("stroke segments gray0.png", "segments jumps to the end of one of 2 segments; edit with a run of"),
        ("stroke nothing gray0.png", "nothing has no snapshots; train it first, or name another run"),
        ("stroke gray gray0.png --class 10", "--class 10 is not one of the 10 classes, 0 to 9"),
        (
            "stroke gray gray0.png gray1.png gray2.png --class 1 2",
            "--class has 2 values for 3 images; give one",
        ),
        ("stroke gray gray0.png --class", "argument --class: expected at least one argument"),
        ("stroke gray gray0.png --ema 0.5", "--ema 0.5 is not a relative width between 0 and"),
        ("stroke gray gray0.png --class 3 --guidance inf", "gray cannot be guided at inf; 1 is no guidance"),
        ("stroke gray gray0.png --class 3 --guidance -1", "gray cannot be guided at -1; 1 is no guidance"),
        (
            "stroke gray gray0.png --class 3 --guidance 2",
            "gray was trained without guidance, so it draws at guidance 1 alone",
        ),
        (
            "stroke gray gray0.png --class 3 --out a.jpg",
            "--out a.jpg does not end in .png; write for example a.png",
        ),
        ("stroke gray gray0.png --class 3 --out gray0.png", "--out gray0.png would overwrite gray0.png"),
        ("stroke gray gray-0.png --class 3 --out gray.png --save-each", "--out gray.png would overwrite gray-0.png"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_compute(
    runs: Path,
    folder: Path,
    words: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for run in runs.iterdir():
        (folder / run.name).symlink_to(run)
    save(folder / "gray-0.png", pixels(8, 8))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(edit, "consistency_network", lambda generator: pytest.fail("a network was asked"))
    assert cli.main(["edit", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"sctrain: error: {sentence}") and err.count("\n") == 1
    assert not (folder / "edited.png").exists()


def test_a_class_has_to_be_given_where_the_network_knows_no_other_way(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["edit", "stroke", str(runs / "gray"), str(folder / "gray0.png")]) == 2
    assert f"{runs / 'gray'} is told the class of every image; give --class, 0 to 9" in capsys.readouterr().err


def test_a_photograph_is_turned_upright(runs: Path, folder: Path):
    array = pixels(8, 8, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    save(folder / "turned.png", array, exif=turned)
    words = ["edit", "denoise", str(runs / "colour"), str(folder / "turned.png"), "--sigma", "0.002", "--save-each"]
    assert cli.main([*words, "--out", str(folder / "grid.png")]) == 0
    upright = torch.from_numpy(np.rot90(array, -1).copy()).permute(2, 0, 1)
    assert (read(folder / "grid-0.png").float() - upright.float()).abs().max() <= 4
