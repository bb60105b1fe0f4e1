"""`sctrain plot schedules`: which panels a method has, what their curves hold, and a picture at the end."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sctrain import cli
from sctrain.commands import sweep
from sctrain.config.loading import load
from sctrain.config.recipes import recipe_names
from sctrain.reporting.curves import spread_plot
from sctrain.reporting.panels import Curve, Panel
from sctrain.schedule_curves import schedule_panels

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
