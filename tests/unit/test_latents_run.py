"""A run on latents from data to figures: the same command line as for images, with a decoder."""

import json
from pathlib import Path

import pytest
from auto_encoder import write_auto_encoder
from digits import publish_random, tiny_config
from PIL import Image
from preparing import write_photos

from data_pipeline.description import read_description
from sctrain import building
from sctrain.cli import main
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation import extractor
from sctrain.evaluation.images import open_pictures
from sctrain.sources import pinned, refuse_unfit_sources


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vae/, and latents/ with a classifier of their pictures."""
    place = tmp_path_factory.mktemp("place")
    photos, vae = write_photos(place / "photos", 60), write_auto_encoder(place / "vae")
    encode = ["--encode", "vae", "--vae", str(vae), "--resolution", "16", "--test-share", "0.2", "--processes", "1"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(extractor, "MIN_STEPS", 5)
        assert main(["prepare", "folder", str(photos), str(place / "latents"), *encode, "--classifier"]) == 0
    return place


def config_of(place: Path, run: Path, **data: object) -> RunConfig:
    evaluation = {"samples": 8, "batch": 8, "ode_steps": 2, "seeds": [0]}
    return RunConfig.model_validate(
        {
            "name": run.name,
            "run_dir": run,
            "data": {"url": str(place / "latents"), "latents": "scm", **data},
            "network": {"width": 16, "depth": 1, "heads": 2},
            "objective": {"name": "trigflow"},
            "batch": {"global_size": 8},
            "budget_images": 64,
            "evaluation": evaluation,
        }
    )


def test_pictures_of_latents(place: Path):
    pictures = open_pictures(str(place / "latents"), "test", place / "vae")
    assert pictures.description.shape == (3, 16, 16) and len(pictures) == 12
    sheet = place / "sheet.png"
    assert main(["data", "show", str(place / "latents"), "--out", str(sheet)]) == 2
    assert main(["data", "show", str(place / "latents"), "--out", str(sheet), "--vae", str(place / "vae")]) == 0
    assert sheet.is_file()
    with pytest.raises(UserError, match=r"name their decoder's folder with 'data.vae'"):
        open_pictures(str(place / "latents"), "test")


def test_it_is_drawn_from_and_scored(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, out = tmp_path / "run", tmp_path / "grid.png"
    publish_random(config_of(place, run), 16)
    draw = ["sample", str(run), "--count", "4", "--out", str(out)]
    assert main(draw) == 2
    assert "give --vae, or set 'data.vae'" in capsys.readouterr().err
    plain = tmp_path / "plain"
    publish_random(tiny_config(plain, "trigflow"), 16)
    assert main(["sample", str(plain), "--out", str(out), "--vae", str(place / "vae")]) == 2
    assert "remove --vae" in capsys.readouterr().err
    assert main([*draw, "--vae", str(place / "vae")]) == 0
    with Image.open(out) as picture:
        assert picture.mode == "RGB" and min(picture.size) >= 32
    run = tmp_path / "with-a-decoder"
    publish_random(config_of(place, run, vae=str(place / "vae")), 16)
    assert main(["evaluate", str(run), "--once", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["sampler"] for line in lines} == {"heun", "euler"} and all(line["fd"] > 0 for line in lines)


def test_teachers_and_starts_of_another_convention_are_refused(place: Path, tmp_path: Path):
    """The same mean and std would be another x: the name decides."""
    teacher = tmp_path / "teacher"
    theirs = config_of(place, teacher)
    publish_random(theirs, 16)
    for key in ("teacher", "start_from"):
        changes = {key: {"run": str(teacher), "ema": 0.05}, "run_dir": tmp_path / "student"}
        objective = {"name": "scd"} if key == "teacher" else {"name": "sct"}
        same = {**theirs.model_dump(mode="json"), **changes, "objective": objective}
        refuse_unfit_sources(pinned(RunConfig.model_validate(same)))
        other = {**same, "data": {"url": str(place / "latents"), "latents": "edm2"}}
        with pytest.raises(UserError, match=r"trained on scm latents, this run has data.latents edm2"):
            refuse_unfit_sources(pinned(RunConfig.model_validate(other)))
        with pytest.raises(UserError, match=r"convention scm, this run has data.latents edm2"):
            building.model_space(RunConfig.model_validate(other), read_description(str(place / "latents")))
