"""The whole chain through the commands that a newcomer and a lab type."""

import json
import sys
from pathlib import Path

import pytest

SMALL = [
    "network.width=32",
    "network.depth=2",
    "network.heads=2",
    "batch.global_size=48",
    "budget_images=480",
    "optimizer.ramp_images=0",
    "optimizer.cooldown_images=0",
    "cadence.status=96",
    "evaluation.samples=60",
    "evaluation.ode_steps=2",
]


@pytest.fixture(scope="module")
def quickstart(sctrain):
    sctrain("quickstart", *SMALL)
    return sctrain


def test_report_and_figures(quickstart):
    folder = quickstart.folder / "runs" / "quickstart"
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "data:image/png;base64," in page and "http" not in page.replace("http://www.w3.org", "")
    figures = json.loads((folder / "figures.json").read_text())
    students = [
        f"{kind}_{role}_{n}step" for kind in ("fd", "agreement", "recall") for role in ("scd", "sct") for n in (1, 2)
    ]
    for name in [
        "fd_resample",
        "fd_test",
        "fd_teacher",
        "ode_mse_scd_1step",
        "ode_mse_sct_1step",
        "wall_minutes",
        *students,
    ]:
        assert figures[name] >= 0, name


def test_again_it_finds_everything_done(quickstart):
    err = quickstart("quickstart", *SMALL).stderr
    assert err.count("is already trained") == 3 and "report.html" in err


def test_sample(quickstart):
    runs = Path("runs") / "quickstart"
    quickstart("sample", runs / "scd", "--count", 20, "--out", "scd.png")
    err = quickstart(
        "sample", runs / "teacher", "--steps", 3, "--count", 5, "--class", 7, "--out", "x/teacher.png"
    ).stderr
    assert "5 network evaluations" in err
    assert (quickstart.folder / "scd.png").stat().st_size > 1000 and (quickstart.folder / "x" / "teacher.png").exists()
    assert "--class 10" in quickstart("sample", runs / "scd", "--class", 10, code=2).stderr
    assert "no snapshot" in quickstart("sample", "nowhere", code=2).stderr


def test_doctor(quickstart):
    out = quickstart("doctor", "digits/quickstart/teacher.yaml").stdout
    assert "[!!]" not in out and "batch 256 = 2 ranks" in out


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher",
    [
        ("deepspeed", "--num_accelerators", "2", "--master_port", "29611", "--module", "sctrain"),
        ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "sctrain"),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_launchers_of_others(sctrain, launcher, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the deepspeed launcher counts accelerators before we are there
    program = str(Path(sys.executable).with_name(launcher[0]))
    config = sctrain.config(launcher[0], budget_images=96)
    sctrain("train", config, launcher=(program, *launcher[1:]))
    assert list(sctrain.losses(launcher[0])) == [48, 96]
    status = json.loads((sctrain.folder / launcher[0] / "status.json").read_text())
    assert status["state"] == "finished" and status["ranks"] == 2
