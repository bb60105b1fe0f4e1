"""`sctrain plot schedules`: which panels a method has, what their curves hold, and a picture at the end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sctrain import cli
from sctrain.commands import sweep
from sctrain.config.loading import load
from sctrain.config.objectives import TrajectoryObjective
from sctrain.config.recipes import recipe_names
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Progress
from sctrain.objectives.drawing import Data
from sctrain.objectives.trajectory import ConsistencyTrajectory
from sctrain.processes import sigma_of
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.reporting.curves import spread_plot
from sctrain.reporting.panels import Curve, Panel
from sctrain.schedule_curves import schedule_panels, start_shares

ALWAYS = ["Noise levels drawn", "Learning rate", "EMA profiles"]


def panels(recipe: str, *overrides: str) -> dict[str, Panel]:
    """By the first words of their titles."""
    names = (*ALWAYS, "Noise levels", "Steps of the student", "Decay", "Mapping", "Warm-up")
    found = schedule_panels(load(recipe, overrides))
    return {next(name for name in names if panel.title.startswith(name)): panel for panel in found}


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("cifar10/edm.yaml", []),
        ("cifar10/pd.yaml", ["Steps of the student"]),
        ("cifar10/cd.yaml", []),
        ("imagenet64/cd.yaml", ["Decay"]),
        ("cifar10/ct.yaml", ["Noise levels", "Decay"]),
        ("cifar10/ict.yaml", ["Noise levels"]),
        ("cifar10/ect.yaml", ["Mapping"]),
        ("cifar10/sct.yaml", ["Warm-up"]),
        ("digits/full/scd.yaml", []),
    ],
)
def test_only_what_the_method_has(recipe: str, more: list[str]):
    assert sorted(panels(recipe)) == sorted([*ALWAYS, *more])


@pytest.mark.parametrize("recipe", recipe_names())
def test_probabilities_sum_to_one(recipe: str):
    """The area under every curve of p over ln sigma; what lies beyond 3.5 standard deviations is left out."""
    for curve in panels(recipe)["Noise levels drawn"].curves:
        log_sigma, density = np.log(curve.x), np.asarray(curve.y)
        area = (density * np.diff(log_sigma)).sum() if curve.held else np.trapezoid(density, log_sigma)
        assert area == pytest.approx(1, abs=6e-3), curve.label


def ctm(**settings) -> tuple[ConsistencyTrajectory, list[Curve]]:
    """The objective, and the curves of its noise levels by the terms of its loss."""
    overrides = [f"objective.{key}={value}" for key, value in settings.items()]
    config = load("cifar10/ctm.yaml", [*overrides, "objective.metric={name: l2, weights: null}"])
    assert isinstance(config.objective, TrajectoryObjective)
    made = build_objective(config.objective, Data(config.sigma_data, 10), (1, 1, 1))
    assert isinstance(made, ConsistencyTrajectory)
    return made, panels("cifar10/ctm.yaml", *overrides)["Noise levels drawn"].curves


@pytest.mark.parametrize("settings", [{}, {"matching": "local"}, {"teacher_steps": 3}])
def test_jumps_of_ctm_start_as_often_as_is_shown(settings: dict):
    made, (matching, _) = ctm(**settings)
    batch, times, drawn = Batch(torch.zeros(8, 1, 1, 1), torch.zeros(8).long()), made.times().float(), []
    for step in range(2000):
        generator = SampleGenerator(0, range(8 * step, 8 * step + 8), Purpose.TRAINING)
        drawn.append(made.draw(generator, batch, Progress(step, 2000)).t)
    shares = torch.bincount(torch.searchsorted(times, torch.cat(drawn)), minlength=len(times)) / 16_000
    expected = start_shares(made.levels, 1 if made.matching == "local" else made.most_steps)
    torch.testing.assert_close(shares[1:].double(), expected, rtol=0, atol=0.015)
    widths = np.diff(np.log(matching.x))
    np.testing.assert_allclose(matching.y * widths, expected, rtol=1e-9)


def test_the_denoising_term_of_ctm_draws_what_is_shown():
    made, (_, denoising) = ctm()
    t = made.denoising_times(SampleGenerator(0, range(100_000), Purpose.TRAINING))
    log_sigma, edges = sigma_of(t, made.sigma_data).log().numpy(), np.log(denoising.x)
    below = np.concatenate([[0], np.cumsum(denoising.y * np.diff(edges))])
    for place in (50, 150, 220, 300, 350):
        assert (log_sigma < edges[place]).mean() == pytest.approx(below[place], abs=6e-3)
    assert len(ctm(denoising=0)[1]) == 1


def ends(curve: Curve) -> tuple[float, float]:
    return curve.y[0], curve.y[-1]


def test_curves_begin_and_end_as_the_papers_say():
    ct, ict, pd = (panels(f"cifar10/{name}.yaml") for name in ("ct", "ict", "pd"))
    assert ends(ct["Noise levels"].curves[0]) == (2, 151)
    assert ends(ict["Noise levels"].curves[0]) == (11, 1281)
    assert sorted(set(ict["Noise levels"].curves[0].y)) == [10 * 2**k + 1 for k in range(8)]
    assert ends(pd["Steps of the student"].curves[0]) == (8192, 1)
    assert ends(ct["Decay"].curves[0]) == pytest.approx((1 - 0.9, 1 - 0.9 ** (2 / 151)))
    warm, budget = panels("cifar10/sct.yaml")["Warm-up"].curves[0], 204_800_000
    assert np.interp(5_120_000 / 2, warm.x, warm.y) == pytest.approx(0.5, rel=1e-3) and ends(warm) == (0, 1)
    rate = panels("imagenet512/trigflow-s.yaml", f"budget_images={budget}")["Learning rate"].curves[0]
    assert max(rate.y) == 0.01 and rate.x[-1] == budget


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "ict.png"
    assert cli.main(["plot", "schedules", "cifar10/ict.yaml", "--out", str(out), "seed=1"]) == 0
    assert str(out) in capsys.readouterr().err
    with Image.open(out) as picture:
        assert picture.width > 1000 and len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 50


def test_a_figure_without_values_is_not_drawn(tmp_path: Path):
    out = tmp_path / "new" / "sweep.png"
    assert not spread_plot(["a", "b"], {"Frechet distance": {"one step": [[], []]}}, out) and not out.parent.exists()
    assert spread_plot(["a", "b"], {"Frechet distance": {"one step": [[], [2.0, 3.0]]}, "none": {}}, out)
    with Image.open(out) as picture:
        assert 500 < picture.width < 900, "one panel"


def test_the_ending_of_a_sweep_is_seen_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sweep, "run_all", lambda trials, jobs: pytest.fail("a run was started"))
    words = ["sweep", "cifar10/sct.yaml", "--vary", "seed=0,1", "--out", str(tmp_path / "all"), "--plot", "x.doc"]
    assert cli.main(words) == 2
    assert "--plot x.doc does not end in .png, .svg or .pdf; write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["plot", "schedules", "cifar10/ict.yaml", "--out", "x.doc"],
            "--out x.doc does not end in .png, .svg or .pdf; write for example x.png",
        ),
        (["plot", "schedules", "cifar10/none.yaml"], "there is no file 'cifar10/none.yaml'"),
        (["plot", "schedules", "cifar10/ict.yaml", "--out", "/proc/no/x.png"], "choose another --out"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
