"""The evaluation worker on runs with tiny networks: what it writes, in which order, and what survives a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import prepared, publish_random, tiny_config, write_status
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sctrain.config.schema import WeightsFrom
from sctrain.errors import UserError
from sctrain.evaluation import worker
from sctrain.evaluation.generation import Generator, Method, teacher_solutions
from sctrain.evaluation.method import start_time
from sctrain.evaluation.queue import claim
from sctrain.evaluation.worker import evaluate
from sctrain.processes import T_MAX
from sctrain.runs import RunFolder
from sctrain.sampling import initial_noise, karras_times, ode_sample

CPU = torch.device("cpu")
KEYS = "images ema seed sampler steps nfe samples fd agreement precision recall nn_ratio ode_mse seconds".split()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    publish_random(tiny_config(run, "trigflow"), 32)
    return run


def student(run: Path, teacher: Path, *images: int, **keys: Any) -> Path:
    publish_random(tiny_config(run, "scd", teacher={"run": teacher, "ema": 0.05}, **keys), *images)
    return run


def test_student_is_scored_newest_first_and_once(tmp_path: Path, teacher: Path, capfd):
    run = student(tmp_path / "scd", teacher, 16, 32, 48, evaluation={"seeds": [0, 1]})
    assert evaluate(run, watch=False) == 3
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("evaluated")]
    assert [line.split()[4] for line in told] == ["48", "32", "16"]
    found = lines(run)
    assert [line["images"] for line in found] == [16] * 4 + [32] * 4 + [48] * 4
    assert all(list(line) == KEYS for line in found)
    assert [(line["seed"], line["sampler"], line["steps"], line["nfe"]) for line in found[:4]] == [
        (seed, "consistency", steps, steps) for seed in (0, 1) for steps in (1, 2)
    ]
    assert all(line["ode_mse"] > 0 for line in found)
    assert evaluate(run, watch=False) == 0 and lines(run) == found


def test_folder_of_a_scored_snapshot(tmp_path: Path, teacher: Path):
    run = student(tmp_path / "scd", teacher, 16, 32)
    evaluate(run, watch=False)
    folder = RunFolder(run).evaluations / "000000000032"
    grids = {path.name for path in folder.glob("*.png")}
    assert grids == {"grid-real.png", "grid-consistency-1.png", "grid-consistency-2.png"}
    assert not list(RunFolder(run).root.rglob(".*")), "no temporary files"
    events = EventAccumulator(str(RunFolder(run).tensorboard / "evaluation"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("fd/consistency-1")}
    assert points == {line["images"]: pytest.approx(line["fd"], rel=1e-5) for line in lines(run) if line["steps"] == 1}
    assert "samples/consistency-1" in events.Tags()["images"]


def test_evaluating_again_replaces_the_lines_of_that_snapshot(tmp_path: Path, teacher: Path):
    run = student(tmp_path / "scd", teacher, 16, 32)
    evaluate(run, watch=False)
    before = lines(run)
    (RunFolder(run).evaluations / "000000000032" / "metrics.json").unlink()
    assert evaluate(run, watch=False) == 1
    again = lines(run)
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in before]


def test_diffusion_model_is_scored_with_both_solvers(teacher: Path):
    evaluate(teacher, watch=False)
    assert [(line["sampler"], line["steps"], line["nfe"], line["ode_mse"]) for line in lines(teacher)] == [
        ("heun", 2, 3, None),
        ("euler", 2, 2, None),
    ]


def test_images_do_not_depend_on_the_batch(tmp_path: Path, teacher: Path):
    config = tiny_config(tmp_path / "small_batches", "trigflow", evaluation={"batch": 7})
    publish_random(config, 32)
    for method in (Method("heun", 2), Method("consistency", 2)):
        one, two = (Generator.of(run, 32, 0.05, CPU).draw(method, 3, 20).x for run in (teacher, config.run_dir))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert not torch.equal(one[:10], one[10:])


def test_ode_solutions_are_the_teachers_own_and_kept(tmp_path: Path, teacher: Path):
    source = WeightsFrom(run=teacher, ema=0.05)
    solutions = teacher_solutions(source, 0, 20, tmp_path, CPU)
    own = Generator.of(teacher, 32, 0.05, CPU).draw(Method("heun", 2), 0, 20).x
    torch.testing.assert_close(solutions, own)
    kept = max(RunFolder(teacher).evaluations.glob("ode-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    before = kept.stat().st_mtime_ns
    assert torch.equal(teacher_solutions(source, 0, 20, tmp_path, CPU), solutions)
    assert kept.stat().st_mtime_ns == before
    assert not torch.allclose(teacher_solutions(source, 1, 20, tmp_path, CPU), own)
    assert not list(tmp_path.iterdir()), "students share what is kept with their teacher"


def test_ode_solutions_of_a_teacher_that_is_read_only_are_kept_by_the_student(
    tmp_path: Path, teacher: Path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: not path.is_relative_to(teacher))
    for _ in range(2):
        teacher_solutions(WeightsFrom(run=teacher, ema=0.05), 2, 20, tmp_path, CPU)
        assert len(list(tmp_path.glob("ode-*.safetensors"))) == 1


def test_ode_solutions_are_of_the_very_weights(tmp_path: Path):
    """A teacher that is trained anew in its folder has other solutions."""
    run, found = tmp_path / "teacher", []
    for noise_input in ("t", "log_sigma"):
        publish_random(tiny_config(run, "trigflow", noise_input=noise_input), 16)
        found.append(teacher_solutions(WeightsFrom(run=run, ema=0.05), 0, 4, tmp_path, CPU))
        shutil.rmtree(RunFolder(run).snapshots)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "lcm", "ddim_steps": 50}, 1.5025),
        ({"name": "cd", "sigma_max": 4.0}, math.atan(8)),
        ({"name": "scd"}, T_MAX),
    ],
)
def test_the_teachers_solutions_start_where_the_student_does(
    tmp_path: Path, teacher: Path, objective: dict[str, Any], expected: float
):
    """At the end of the process that the student was trained on."""
    source = WeightsFrom(run=teacher, images=32, ema=0.05)
    config = tiny_config(tmp_path / "student", "scd", teacher=source, evaluation={"steps": [1]})
    config = config.model_validate(config.model_dump() | {"objective": objective})
    publish_random(config, 16)
    for other in RunFolder(teacher).evaluations.glob("ode-*"):
        other.unlink()
    evaluate(config.run_dir, watch=False)
    (kept,) = RunFolder(teacher).evaluations.glob("ode-*")
    start, generator = (
        start_time(config),
        Generator.of(teacher, 32, 0.05, CPU, 3.0 if "ddim_steps" in objective else 1.0),
    )
    assert start == pytest.approx(expected, abs=1e-4)
    noise, labels = initial_noise(0, torch.arange(40), (1, 8, 8), 0.5), torch.arange(40) % 10
    own = ode_sample(generator.F, noise, (labels,), 0.5, 2, "heun", karras_times(2, 0.5, start=start))
    torch.testing.assert_close(load_file(kept)["x"], own)


def test_sct_is_compared_with_the_teacher_it_is_given(tmp_path: Path, teacher: Path):
    for run, given in (("alone", None), ("beside", {"run": str(teacher), "ema": 0.05})):
        evaluation = {"steps": [1], "ode_teacher": given}
        publish_random(tiny_config(tmp_path / run, "sct", evaluation=evaluation), 16)
        evaluate(tmp_path / run, watch=False)
    assert [line["ode_mse"] for line in lines(tmp_path / "alone")] == [None]
    assert all(line["ode_mse"] > 0 for line in lines(tmp_path / "beside"))


def test_guidance_of_a_teacher_and_of_a_guided_student(tmp_path: Path, teacher: Path):
    """A guided diffusion model is evaluated with and without labels; a guided student is told the scale."""
    plain, guided = (Generator.of(teacher, 32, 0.05, CPU, scale).draw(Method("euler", 2), 0, 20) for scale in (1, 2))
    assert (plain.nfe, guided.nfe) == (2, 4) and not torch.allclose(plain.x, guided.x)
    source = {"run": str(teacher), "images": 32, "ema": 0.05}
    objective = {"name": "scd", "guidance": {"low": 1.0, "high": 2.0}}
    config = tiny_config(tmp_path / "guided", "scd", teacher=source, evaluation={"guidance": 1.5})
    config = config.model_validate(config.model_dump() | {"objective": objective})
    publish_random(config, 16)
    drawn = [
        Generator.of(config.run_dir, 16, 0.05, CPU, s).draw(Method("consistency", 1), 0, 20) for s in (None, 1.5, 2)
    ]
    assert torch.equal(drawn[0].x, drawn[1].x) and not torch.allclose(drawn[0].x, drawn[2].x)
    before = set(RunFolder(teacher).evaluations.glob("ode-*"))
    evaluate(config.run_dir, watch=False)
    assert len(set(RunFolder(teacher).evaluations.glob("ode-*")) - before) == 1


def test_guidance_that_a_student_has_not_learnt_is_refused(tmp_path: Path, teacher: Path):
    run = student(tmp_path / "scd", teacher, 16)
    with pytest.raises(UserError, match="trained without guidance, so it draws at guidance 1 alone"):
        Generator.of(run, 16, 0.05, CPU, 2.0)


def test_teacher_without_snapshots_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere.* has no snapshots; train it first"):
        teacher_solutions(WeightsFrom(run=tmp_path / "nowhere", ema=0.05), 0, 4, tmp_path, CPU)


def test_overtaken_worker_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch, capfd):
    run = tmp_path / "slow"
    publish_random(tiny_config(run, "trigflow"), 16)
    folder = RunFolder(run).evaluations / "000000000016"
    genuine = worker.evaluate_snapshot

    def overtaken(*arguments):
        first = folder / "claim-0001.json"
        os.utime(first, (0, 0))  # this worker slept for too long, and another one came
        assert claim(folder, 60) is not None
        return genuine(*arguments)

    monkeypatch.setattr(worker, "evaluate_snapshot", overtaken)
    assert evaluate(run, watch=False) == 0
    assert "taken over by another worker; this worker's result is discarded" in capfd.readouterr().err
    assert not (folder / "metrics.json").exists() and not RunFolder(run).metrics.exists()


def test_watching_worker_outlives_a_kill_and_ends_with_the_run(tmp_path: Path):
    run = tmp_path / "run"
    publish_random(tiny_config(run, "trigflow", evaluation={"samples": 1000, "batch": 2}), 16)
    write_status(run, "running", 16, 1.0)
    watching = _watch(run)
    claimed = RunFolder(run).evaluations / "000000000016" / "claim-0001.json"
    _wait_for(claimed, watching)
    watching.send_signal(signal.SIGKILL)
    watching.communicate()
    assert not (claimed.parent / "metrics.json").exists(), "killed at work"
    publish_random(tiny_config(run, "trigflow"), 32)
    write_status(run, "finished", 32, 2.0)
    assert evaluate(run, watch=True) == 2
    assert {line["images"] for line in lines(run)} == {16, 32}


def test_watching_worker_waits_for_a_run_that_has_not_begun(tmp_path: Path, monkeypatch):
    run = tmp_path / "run"

    def begin(_: float) -> None:
        publish_random(tiny_config(run, "trigflow"), 16)
        write_status(run, "finished", 16, 1.0)

    monkeypatch.setattr(worker.time, "sleep", begin)
    assert evaluate(run, watch=True) == 1


def test_watching_worker_waits_for_a_stopped_run_to_go_on(tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    config = tiny_config(run, "trigflow")
    publish_random(config, 16)
    write_status(run, "stopped", 16, 1.0)

    def go_on(_: float) -> None:
        publish_random(config, 32)
        write_status(run, "stopped", 32, 2.0)

    monkeypatch.setattr(worker.time, "sleep", go_on)
    assert evaluate(run, watch=True) == 2


def _watch(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sctrain", "evaluate", str(run), "--watch"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def _wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)


def test_run_folder_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        evaluate(tmp_path / "nowhere", watch=False)


def test_prepared_data_without_extractor_is_named(tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(prepared()).iterdir():
        if "extractor" not in file.name:
            (bare / file.name).symlink_to(file)
    config = tiny_config(tmp_path / "run", "trigflow")
    publish_random(config.model_copy(update={"data": config.data.model_copy(update={"url": str(bare)})}), 16)
    with pytest.raises(UserError, match=r"bare has no extractor\.json"):
        evaluate(config.run_dir, watch=False)
