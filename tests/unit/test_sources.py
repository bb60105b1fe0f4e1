"""Runs that weights come from: whatever does not fit the method is refused by their descriptions, before any weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import publish_random, tiny_config

from sctrain.building import (
    guide_network,
    open_split,
    score_network,
    snapshot_weights,
    teacher_network,
    trained_network,
)
from sctrain.config.schema import RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.sources import pinned, refuse_unfit_sources


def published(folder: Path, objective: dict[str, Any], **keys: Any) -> Path:
    """A run with a snapshot of random weights."""
    publish_random(described(folder, objective, **keys), 16)
    return folder


def described(folder: Path, objective: dict[str, Any], **keys: Any) -> RunConfig:
    config = tiny_config(folder, "sct", **keys).model_dump()
    return RunConfig.model_validate(config | {"objective": objective})


def refusal(folder: Path, objective: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        refuse_unfit_sources(described(folder, objective, **keys))
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1 and str(folder.parent) in sentence
    return sentence


def of(run: Path) -> dict[str, Any]:
    return {"run": str(run), "images": 16, "ema": 0.05}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return published(tmp_path / "teacher", {"name": "trigflow", "label_dropout": 0.0})


DISTILLED = ("pd", "cd", "cd_continuous", "scd", "scd_discrete", "ctm")


@pytest.mark.parametrize("name", [*DISTILLED, "lcm"])
def test_a_teacher_that_is_a_student(tmp_path: Path, name: str):
    student = published(tmp_path / "student", {"name": "sct"})
    sentence = refusal(tmp_path / "run", {"name": name}, teacher=of(student))
    assert sentence == f"{student} was trained by 'sct'; a teacher is a diffusion model"


@pytest.mark.parametrize("name", DISTILLED)
def test_a_teacher_that_differs_from_its_student(teacher: Path, tmp_path: Path, name: str):
    objective, of_it = {"name": name}, {"teacher": of(teacher)}
    refuse_unfit_sources(described(tmp_path / "run", objective, **of_it))
    assert "set 'sigma_data' to that run's" in refusal(tmp_path / "run", objective, sigma_data=1.0, **of_it)
    assert "is told t: set 'noise_input'" in refusal(tmp_path / "run", objective, noise_input="log_sigma", **of_it)
    data = described(tmp_path / "run", objective, **of_it).data.model_dump()
    for key, theirs, ours in (("mean", 0.3053, 0.5), ("std", 0.376, 0.25)):
        sentence = refusal(tmp_path / "run", objective, **of_it, data=data | {key: [ours]})
        assert f"with data.{key} [{theirs}], this run has [{ours}]" in sentence
    for key, theirs, ours in (("width", 16, 32), ("heads", 2, 4), ("time_scale", 1.0, 0.5)):
        network = {"width": 16, "depth": 1, "heads": 2, key: ours}
        sentence = refusal(tmp_path / "run", objective, **of_it, network=network)
        assert f"network.{key} {theirs}, this run has {ours}" in sentence


def test_dropout_and_a_value_for_all_channels_are_no_difference(teacher: Path, tmp_path: Path):
    run, of_it = tmp_path / "run", {"teacher": of(teacher)}
    refuse_unfit_sources(
        described(run, {"name": "scd"}, **of_it, network={"width": 16, "depth": 1, "heads": 2, "dropout": 0.5})
    )
    data = described(run, {"name": "scd"}, **of_it).data.model_dump()
    refuse_unfit_sources(described(run, {"name": "scd"}, **of_it, data=data | {"mean": [0.3053] * 3}))
    assert "data.mean" in refusal(run, {"name": "scd"}, **of_it, data=data | {"mean": [0.3053, 0.3053, 0.3]})


@pytest.mark.parametrize(
    ("objective", "mend"),
    [
        ({"name": "scd", "guidance": {}}, "remove 'objective.guidance', or train it with objective.label_dropout=0.1"),
        ({"name": "scd_discrete", "guidance": {}}, "remove 'objective.guidance', or train it with "),
        ({"name": "lcm"}, "so it cannot be guided; train it with objective.label_dropout=0.1"),
    ],
)
def test_guidance_of_a_teacher_without_label_dropout(
    teacher: Path, tmp_path: Path, objective: dict[str, Any], mend: str
):
    assert mend in refusal(tmp_path / "run", objective, teacher=of(teacher))
    guide = published(tmp_path / "guide", {"name": "trigflow"})
    refuse_unfit_sources(described(tmp_path / "run", objective, teacher=of(teacher), guide=of(guide)))


GUIDED = {"name": "scd", "guidance": {}}


def test_a_guide_that_fits(teacher: Path, tmp_path: Path):
    """Of another shape, and told another noise: what it says is made the same."""
    network = {"width": 8, "depth": 1, "heads": 2}
    guide = published(tmp_path / "guide", {"name": "edm"}, network=network, noise_input="log_sigma")
    told = of(guide) | {"labels": "same"}
    config = described(tmp_path / "run", GUIDED, teacher=of(teacher), guide=told)
    refuse_unfit_sources(config)
    made, values = guide_network(config, open_split(config).description)
    assert made.shapes == {name: tuple(x.shape) for name, x in made.whole(values).named_parameters()}
    assert made.shapes["head.weight"][1] == 8


def test_a_guide_that_does_not_fit(teacher: Path, tmp_path: Path):
    asked = {"teacher": of(teacher)}
    student = published(tmp_path / "student", {"name": "sct"})
    assert "a guide is a diffusion model" in refusal(tmp_path / "run", GUIDED, **asked, guide=of(student))
    assert "set 'guide.labels' to same" in refusal(tmp_path / "run", GUIDED, **asked, guide=of(teacher))
    wide = published(tmp_path / "wide", {"name": "trigflow"}, sigma_data=1.0)
    assert "with sigma_data 1.0" in refusal(tmp_path / "run", GUIDED, **asked, guide=of(wide))


def test_a_guides_snapshot_and_licence_are_the_runs(teacher: Path, tmp_path: Path):
    guide = published(tmp_path / "guide", {"name": "trigflow"}, licence="of the guide")
    newest = {"run": str(guide), "ema": 0.05}
    config = pinned(described(tmp_path / "run", GUIDED, teacher=of(teacher), guide=newest))
    assert config.guide is not None and config.guide.images == 16 and config.licence == "of the guide"


def test_a_fake_score_starts_as_the_teacher(teacher: Path, tmp_path: Path):
    config = described(tmp_path / "run", GUIDED | {"vsd": {}}, teacher=of(teacher))
    network, values = score_network(config, open_split(config).description)
    theirs, made = snapshot_weights(WeightsFrom(**of(teacher))), dict(network.whole(values).named_parameters())
    kept = [name for name in theirs.shapes if not name.startswith("weighting.")]
    assert len(kept) > 20
    for name in kept:
        mine = made[f"network.{name}"].detach().flatten()
        assert torch.equal(mine, theirs.read(name, 0, mine.numel()))
    assert "balance.out.weight" in made and not made["network.condition.guidance.weight"].any()


def test_lcf_starts_from_an_lcm(teacher: Path, tmp_path: Path):
    sentence = refusal(tmp_path / "run", {"name": "lcf"}, start_from=of(teacher))
    assert sentence == f"{teacher} was trained by 'trigflow'; 'lcf' fine-tunes an LCM: let 'start_from.run' be one"
    lcm = published(tmp_path / "lcm", {"name": "lcm"}, teacher=of(teacher))
    refuse_unfit_sources(described(tmp_path / "run", {"name": "lcf"}, start_from=of(lcm)))


def test_a_start_of_another_network_or_input(teacher: Path, tmp_path: Path):
    start = {"start_from": of(teacher)}
    network = {"width": 16, "depth": 1, "heads": 4}
    assert "use the 'network' of that run" in refusal(tmp_path / "run", {"name": "ect"}, **start, network=network)
    assert "set 'noise_input' to t" in refusal(tmp_path / "run", {"name": "ict"}, **start, noise_input="log_sigma")


def test_images_of_other_channels(teacher: Path, tmp_path: Path):
    config = described(tmp_path / "run", {"name": "scd"}, teacher=of(teacher))
    data = open_split(config).description.model_copy(update={"channels": 3})
    with pytest.raises(UserError, match=r"embed.weight is .* here and there; .* as many channels and classes"):
        teacher_network(config, data)


def test_a_teacher_told_of_its_augmentation_is_one(tmp_path: Path):
    """Its label's layer belongs to it, and it is told nothing when it teaches."""
    told = published(tmp_path / "told", {"name": "edm", "augmentation": 0.12})
    config = described(tmp_path / "run", {"name": "cd"}, teacher=of(told))
    refuse_unfit_sources(config)
    data = open_split(config).description
    teacher, weights = teacher_network(config, data)
    assert "condition.augmentation.weight" in teacher.shapes and teacher.whole(weights)
    with pytest.raises(UserError, match=r"condition.augmentation.weight is absent"):
        trained_network(config, data, WeightsFrom(run=told, images=16, ema=0.05))
