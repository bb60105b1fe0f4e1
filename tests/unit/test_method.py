"""Which samplers fit a run, what a user may choose among them, and that every kind of run is drawn from and scored."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from digits import publish_random, tiny_config

from sctrain import cli
from sctrain.config.checks import check
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import (
    Method,
    Sampler,
    chosen,
    guidance_scale,
    methods,
    most_steps,
    only_steps,
    start_time,
    times_of,
    trained_times,
)
from sctrain.evaluation.results import Result
from sctrain.evaluation.worker import evaluate
from sctrain.objectives.levels import ddim_times
from sctrain.processes import T_MAX
from sctrain.runs import RunFolder

CPU = torch.device("cpu")
SEGMENTED = {"name": "scd", "segments": 3}
PROGRESSIVE = {"name": "pd", "first_steps": 4, "last_steps": 1}
GUIDED = {"name": "lcm", "ddim_steps": 50, "guidance": {"low": 3.0, "high": 15.0}}
KINDS: dict[str, dict[str, Any]] = {
    "edm": {"name": "edm"},
    "cd": {"name": "cd"},
    "pd": PROGRESSIVE,
    "ctm": {"name": "ctm"},
    "lcm": GUIDED,
    "segmented": SEGMENTED,
}


def described(objective: dict[str, Any], run: Path = Path("runs/a"), **keys: Any) -> RunConfig:
    config = tiny_config(run, "trigflow", **keys)
    return RunConfig.model_validate(config.model_dump() | {"objective": objective})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("edm", ["heun-2", "euler-2"]),
        ("cd", ["consistency-1", "consistency-2"]),
        ("pd", ["jumps-1"]),
        ("ctm", ["jumps-1", "jumps-2"]),
        ("lcm", ["consistency-1", "consistency-2"]),
        ("segmented", ["jumps-3"]),
    ],
)
def test_what_a_run_is_scored_with(kind: str, expected: list[str]):
    assert [method.name for method in methods(described(KINDS[kind]))] == expected


def test_progressive_distillation_is_drawn_from_as_far_as_it_has_come():
    """64 images in three stages of 4, 2 and 1 steps; at a border the student has seen the stage before it alone."""
    config = described(PROGRESSIVE, budget_images=63)
    seen = {images: only_steps(config, images) for images in (1, 21, 22, 42, 43, 63, 100)}
    assert seen == {1: 4, 21: 4, 22: 2, 42: 2, 43: 1, 63: 1, 100: 1}
    assert only_steps(config) == 1 and only_steps(described({"name": "ctm"})) is None


def test_times_of_every_kind():
    assert times_of(described(PROGRESSIVE), Method("jumps", 2)) == [T_MAX, T_MAX / 2, 0]
    assert times_of(described(SEGMENTED), Method("jumps", 3)) == pytest.approx([T_MAX, T_MAX * 2 / 3, T_MAX / 3, 0])
    for method, middle in ((Method("jumps", 2), 1.1), (Method("jumps", 2, (0.4,), 0.5), 0.4)):
        assert times_of(described({"name": "ctm"}), method) == pytest.approx([math.atan(160), middle, 0])
    assert times_of(described({"name": "sct"}), Method("consistency", 2)) == [T_MAX, 1.1]
    many = times_of(described({"name": "ct"}), Method("consistency", 2000))
    assert many[0] > many[1] > many[-1] > math.atan(0.002 / 0.5), "never below the level where f is the identity"


def test_where_a_student_was_trained_at_few_times_it_is_drawn_from_at_these():
    """CD's grid of 18, above the level at which it is the identity, and LCM's 50: a time between two is the nearer."""
    cd, lcm = described({"name": "cd"}), described(GUIDED)
    grid = [math.atan(((0.002 ** (1 / 7) + i / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7) / 0.5) for i in range(18)]
    assert trained_times(cd) == pytest.approx(grid[:0:-1])
    assert times_of(cd, Method("consistency", 2)) == pytest.approx([grid[17], grid[7]])  # 1.140 for 1.1
    assert times_of(cd, Method("consistency", 17)) == pytest.approx(grid[:0:-1]), "each once"
    assert times_of(cd, Method("consistency", 3, (0.5, 0.45))) == pytest.approx([grid[17], grid[5], grid[4]])
    assert most_steps(cd) == 17 and most_steps(lcm) == 50
    times = times_of(lcm, Method("consistency", 3, (1.0, 0.01)))
    assert times[0] == start_time(lcm) and abs(times[1] - 1.0) < 0.02 and times[2] == ddim_times(50)[1].item()
    assert {*times} < {*ddim_times(50).tolist()}
    at_level = described({"name": "cd", "levels": 40}, evaluation={"middle_time": 1.2237})
    assert times_of(at_level, Method("consistency", 2))[1] == pytest.approx(1.2237, abs=1e-4)
    for free in ("ct", "ict", "ect", "sct", "ctm"):
        assert trained_times(described({"name": free})) is None


def test_sampling_starts_where_the_process_ends():
    assert start_time(described({"name": "cd"}, sigma_data=1.0)) == pytest.approx(math.atan(80))
    assert start_time(described({"name": "cd", "sigma_max": 1.0})) == pytest.approx(math.atan(2))
    assert start_time(described({"name": "sct"}, sigma_data=1.0)) == T_MAX
    lcm = described(GUIDED)
    assert math.cos(start_time(lcm)) == pytest.approx(0.0683, abs=1e-4)  # alpha of the last of the 1000 steps
    assert times_of(lcm, Method("consistency", 1)) == [start_time(lcm)]


def test_what_a_user_may_choose():
    teacher, ctm, cd = (described({"name": name}) for name in ("trigflow", "ctm", "cd"))
    assert chosen("a", teacher, 8) == Method("heun", 2)
    assert chosen("a", teacher, 8, sampler="dpm", steps=7) == Method("dpm", 7)
    assert chosen("a", ctm, 8, gamma=0.5, steps=4) == Method("jumps", 4, None, 0.5)
    assert chosen("a", cd, 8) == Method("consistency", 1)
    assert chosen("a", cd, 8, times=[1.2, 0.3]) == Method("consistency", 3, (1.2, 0.3))
    assert chosen("a", described(SEGMENTED), 8) == Method("jumps", 3) == chosen("a", described(SEGMENTED), 8, steps=3)


@pytest.mark.parametrize(
    ("kind", "asked", "sentence"),
    [
        (
            "cd",
            {"sampler": "heun"},
            "runs/a was trained by 'cd', which --sampler heun does not fit; choose consistency",
        ),
        ("edm", {"sampler": "jumps"}, "choose heun or euler or dpm"),
        ("cd", {"steps": 0}, "--steps must be at least 1"),
        ("cd", {"gamma": 0.5}, "--gamma is for 'ctm'"),
        ("ctm", {"gamma": 1.5}, "--gamma 1.5 is not between 0"),
        ("ctm", {"gamma": math.nan}, "--gamma nan is not between 0"),
        ("pd", {"steps": 2}, "to jump over 1 even parts, so it draws in --steps 1 alone"),
        ("segmented", {"steps": 2}, "to jump over 3 even parts"),
        ("segmented", {"times": [1.0, 0.5]}, "whose times are given by --steps; remove --times"),
        ("edm", {"times": [1.0]}, "whose times are given by --steps; remove --times"),
        ("cd", {"times": [1.0, 1.1]}, "--times must descend from below 1.5645, the first, to above 0.004"),
        ("cd", {"times": [1.57]}, "--times must descend"),
        ("cd", {"times": [0.003]}, "--times must descend"),
        ("cd", {"times": [math.nan]}, "--times must descend"),
        ("cd", {"times": [1.0], "steps": 3}, "--times gives 1 times after the first, which are not the --steps 3"),
        ("lcm", {"steps": 51}, "at 50 times, so it draws in --steps 50 at most"),
        ("cd", {"steps": 18}, "at 17 times, so it draws in --steps 17 at most"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, asked: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as refusal:
        chosen("runs/a", described(KINDS[kind]), 64, **asked)
    assert sentence in str(refusal.value)


def test_scales_of_guidance():
    guided, plain = described(GUIDED), described({"name": "edm", "label_dropout": 0.1})
    assert guidance_scale("a", guided, None) == 3 and guidance_scale("a", guided, 7.5) == 7.5
    assert guidance_scale("a", plain, None) == 1 and guidance_scale("a", plain, 2) == 2
    assert guidance_scale("a", described({"name": "scd", "guidance": {"low": 1, "high": 2}}), None) == 1
    for objective, asked, sentence in (
        (GUIDED, 1, "runs/a learns guidance at scales from 3 to 15, not 1"),
        ({"name": "edm"}, 2, "runs/a was trained without label dropout, so it draws at guidance 1 alone"),
        ({"name": "trigflow"}, -1, "runs/a cannot be guided at -1; 1 is no guidance"),
    ):
        with pytest.raises(UserError, match=sentence):
            guidance_scale("runs/a", described(objective), asked)
    check(described({"name": "edm", "label_dropout": 0.1}, evaluation={"guidance": 1.5}))
    with pytest.raises(UserError, match=r"'evaluation\.guidance' does not fit: a run of this objective was trained wi"):
        check(described({"name": "edm"}, evaluation={"guidance": 1.5}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_scored_by_the_worker(kind: str, tmp_path: Path):
    config = described(KINDS[kind], tmp_path / kind)
    publish_random(config, 64)
    assert evaluate(config.run_dir, watch=False) == 1
    lines = [json.loads(line) for line in RunFolder(config.run_dir).metrics.read_text().splitlines()]
    expected = methods(config, 64)
    assert [(line["sampler"], line["steps"]) for line in lines] == [method[:2] for method in expected]
    evaluations = [3, 2] if kind == "edm" else [method.steps for method in expected]
    assert [line["nfe"] for line in lines] == evaluations and all(math.isfinite(line["fd"]) for line in lines)
    scores = Result.of("it", config.run_dir).scores
    if kind == "edm":
        assert len(scores) == 1 and scores[0].suffix == "it" and scores[0].title.endswith(" ODE")
    else:
        noun = "jump" if expected[0].sampler == "jumps" else "step"
        assert [score.suffix for score in scores] == [f"it_{method.steps}step" for method in expected]
        assert scores[0].title == f"it, {expected[0].steps} {noun}{'s' * (expected[0].steps > 1)}"


def test_images_do_not_depend_on_the_batch_whatever_the_sampler(tmp_path: Path):
    asked = {"ctm": Method("jumps", 3, None, 0.5), "lcm": Method("consistency", 3), "edm": Method("dpm", 4)}
    for kind, method in asked.items():
        drawn = []
        for batch in (20, 7):
            config = described(KINDS[kind], tmp_path / f"{kind}-{batch}", evaluation={"batch": batch})
            publish_random(config, 16)
            drawn.append(Generator.of(config.run_dir, 16, 0.05, CPU).draw(method, 3, 20))
        assert drawn[0].nfe == method.steps
        torch.testing.assert_close(drawn[0].x, drawn[1].x, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A teacher, a student and one that jumps, of the same data."""
    root = tmp_path_factory.mktemp("runs")
    for name, objective in (("teacher", {"name": "trigflow"}), ("cd", {"name": "cd"}), ("pd", PROGRESSIVE)):
        publish_random(described(objective, root / name), 16)
    return root


def test_sample_draws_as_asked(runs: Path, tmp_path: Path, capsys):
    out = tmp_path / "a.png"
    words = {
        "cd --times 1.1 0.4": "10 images by 3 steps, 3 network evaluations each",
        "teacher --sampler dpm --steps 4": "10 images by DPM-Solver++(2M) ODE, 4 network evaluations each",
        "pd": "10 images by 4 jumps, 4 network evaluations each",
    }
    for flags, sentence in words.items():
        run, *rest = flags.split()
        assert cli.main(["sample", str(runs / run), *rest, "--count", "10", "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert sentence in said and out.is_file()
        moved = "at a few times alone: the nearest to --times are t = 1.1401, 0.2721"
        assert (moved in said) == flags.startswith("cd")
        out.unlink()
    assert cli.main(["sample", str(runs / "cd"), "--times", "1.1401", "--count", "10", "--out", str(out)]) == 0
    assert "at a few times alone" not in capsys.readouterr().err
    out.unlink()
    assert cli.main(["sample", str(runs / "pd"), "--steps", "2", "--out", str(out)]) == 2
    assert cli.main(["sample", str(runs / "cd"), "--ema", "2", "--out", str(out)]) == 2
    assert "--ema 2 is not a relative width" in capsys.readouterr().err and not out.exists()
    for name, example in (("a.txt", "a.png"), ("a", "a.png"), (".", "picture.png")):
        assert cli.main(["sample", str(runs / "cd"), "--out", name]) == 2
        assert f"or .tiff; write for example {example}" in capsys.readouterr().err


def test_bench_sample_rows_and_plot(runs: Path, tmp_path: Path, capsys):
    plot = tmp_path / "curve.png"
    names = [str(runs / name) for name in ("teacher", "cd", "pd")]
    short = ["--evaluations", "2", "5", "--steps", "1", "3", "--samples", "30"]
    assert cli.main(["bench", "sample", *names, *short, "--plot", str(plot), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["sampler"], row["steps"], row["nfe"]) for row in rows] == [
        *(("teacher", "euler", n, n) for n in (2, 5)),
        *(("teacher", "heun", n, 2 * n - 1) for n in (1, 3)),
        *(("teacher", "dpm", n, n) for n in (2, 5)),
        *(("cd", "consistency", n, n) for n in (1, 3)),
        ("pd", "jumps", 4, 4),
    ]
    assert all(row["fd"] > 0 and row["seconds_per_image"] > 0 and row["broken"] == 0 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not (runs / "cd" / "evaluations").exists(), "a bench leaves nothing in the runs"
    assert cli.main(["bench", "sample", names[1], *short]) == 0
    out = capsys.readouterr().out
    assert "30 images of seed 0 per row" in out and "Frechet distance" in out and "ms per image" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--plot", "curve"], "--plot curve does not end in .png, .svg or .pdf; write for example curve.png"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--guidance", "2"], "cd was trained without guidance, so it draws at guidance 1 alone"),
        (["--guidance", "inf"], "teacher cannot be guided at inf"),
        (["--ema", "0.9"], "--ema 0.9 is not a relative width"),
    ],
)
def test_bench_sample_refuses(runs: Path, flags: list[str], sentence: str, capsys):
    assert cli.main(["bench", "sample", str(runs / "teacher"), str(runs / "cd"), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_times_are_searched_by_the_runs_own_distance(runs: Path, capsys):
    asked = ["times", str(runs / "cd"), "--samples", "40", "--rounds", "2"]
    assert cli.main([*asked, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    tried = [float(line.split()[-1]) for line in err.splitlines() if "Frechet distance" in line]
    assert len(tried) == 4 and found["fd"] == pytest.approx(min(tried), abs=1e-3)
    start = found["own_times"][0]
    assert found["own_times"] == [start, pytest.approx(1.1401, abs=1e-4)]
    assert found["times"][0] == start and found["times"][1] in trained_times(described({"name": "cd"}))[1:]
    assert cli.main(asked) == 0
    assert f"--times {found['times'][1]:.4f}" in capsys.readouterr().out
    for run in ("teacher", "pd"):
        assert cli.main(["times", str(runs / run)]) == 2
        assert "whose times are given by --steps; name a run whose times are free" in capsys.readouterr().err
    assert cli.main([*asked, "--steps", "1"]) == 2 and "at least 2" in capsys.readouterr().err


def test_names_of_the_command_line_are_those_of_the_samplers():
    assert get_args(Sampler) == cli._SAMPLERS
