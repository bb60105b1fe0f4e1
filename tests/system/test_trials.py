"""`sctrain sweep` and `sctrain bench methods` on the digits, small enough for a minute."""

import json
import shutil
from pathlib import Path

import pytest
from digits import prepared
from PIL import Image

from sctrain.evaluation.extractor import ABOUT, WEIGHTS

SMALL = {
    "objective": {"name": "sct", "tangent_normalization": "rms"},
    "evaluation": {"samples": 100, "batch": 50, "steps": [1, 2], "ode_steps": 3},
    "budget_images": 48 * 3,
    "runtime": {"ranks": 1, "threads": 1},
    "deepspeed": {"zero_optimization": {"stage": 0}},
}


@pytest.fixture(scope="module", autouse=True)
def classifier(sctrain):
    """What images are scored with: the one that unit tests use."""
    for name in (WEIGHTS, ABOUT):
        shutil.copy(Path(prepared()) / name, sctrain.data)


def test_a_sweep_trains_each_point_once_and_compares(sctrain):
    config = sctrain.config("swept", **SMALL)
    command = (
        "sweep",
        config,
        "--vary",
        "objective.tangent_constant=0,0.1",
        "--seeds",
        0,
        1,
        "--out",
        "points",
        "--json",
    )
    first = sctrain(*command)
    rows = json.loads(first.stdout)
    assert {(row["method"], row["seed"], row["steps"]) for row in rows} == {
        (f"tangent_constant={c}", seed, steps) for c in ("0", "0.1") for seed in (0, 1) for steps in (1, 2)
    }
    assert all(row["fd"] > 0 for row in rows)
    with Image.open(sctrain.folder / "points" / "sweep.png") as picture:
        assert picture.size[0] > 300
    again = sctrain(*command)
    assert "4 of 4 runs are done already" in again.stderr and json.loads(again.stdout) == rows


def test_every_method_is_compared_with_one_teacher(sctrain):
    tiny = [
        *("network.width=32", "network.depth=1", "network.heads=2", "budget_images=768", "evaluation.samples=100"),
        *("evaluation.ode_steps=3", "cadence.status=768", f"data.url={sctrain.data}"),
        "guard.tangent_error=1.0",  # after three steps the gates are hardly open, and differences mostly rounding
    ]
    command = ("bench", "methods", "--methods", "ect", "scd", "--seeds", 0, "--rounds", 1, "--out", "table", "--json")
    rows = json.loads(sctrain(*command, "--set", *tiny).stdout)
    kinds = {(row["method"], row["sampler"], row["steps"]) for row in rows}
    students = {(method, "consistency", steps) for method in ("ect", "scd") for steps in (1, 2, 4)}
    assert students <= kinds and ("teacher", "heun", 3) in kinds
    for row in rows:
        assert set(row) >= {"method", "seed", "steps", "fd", "ode_distance", "agreement", "cost_ratio"}
        assert row["fd"] > 0 and row["cost_ratio"] > 0.5
        assert (row["ode_distance"] is None) == (row["method"] == "teacher")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("bench", "methods", "--methods", "lcf"), "lcf starts from lcm; name it too"),
        (("bench", "methods", "--methods", "magic"), "--methods: 'magic' is none of pd, cd, ct"),
        (("sweep", "digits/quickstart/teacher.yaml", "--vary", "seed", "--out", "x"), "write it as key=v1,v2"),
        (("sweep", "digits/quickstart/teacher.yaml", "--vary", "sede=1", "--out", "x"), "unknown key 'sede'"),
    ],
)
def test_mistakes(sctrain, command, sentence):
    assert sentence in sctrain(*command, code=2).stderr
