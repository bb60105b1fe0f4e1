"""A run that is killed, stopped or moved to another number of ranks is the same run."""

import json
import os
import shutil
import signal
import time

import pytest

STEP = 48


def wait_for(sctrain, process, run: str, images: int) -> None:
    """Until the run has reported `images`."""
    stats = sctrain.folder / run / "stats.jsonl"
    deadline = time.monotonic() + 120
    while not (stats.exists() and f'"images": {images},' in stats.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(sctrain) -> dict[int, float]:
    sctrain("train", sctrain.config("whole"))
    losses = sctrain.losses("whole")
    assert list(losses) == [STEP * k for k in range(1, 21)]
    return losses


@pytest.fixture(scope="module")
def killed(sctrain) -> str:
    """A run whose processes were all killed at step 13; its newest checkpoint is of step 10."""
    process = sctrain.start("train", sctrain.config("killed"))
    wait_for(sctrain, process, "killed", 13 * STEP)
    process.send_signal(signal.SIGKILL)  # the ranks die with their parent
    process.communicate()
    newest = max(path.name for path in (sctrain.folder / "killed" / "checkpoints").iterdir())
    assert int(newest) == 10 * STEP
    return "killed"


def test_seeded(uninterrupted):
    assert len(set(uninterrupted.values())) == 20 and all(loss is not None for loss in uninterrupted.values())


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.full)])
def test_other_numbers_of_ranks_go_on_with_the_same_batches(sctrain, killed, uninterrupted, ranks):
    run = f"elastic{ranks}"
    shutil.copytree(sctrain.folder / killed, sctrain.folder / run)
    config = sctrain.config(run, batch={"global_size": 48, "micro_limit": 8})
    result = sctrain("train", config, "--ranks", ranks)
    assert "resumed" in result.stderr and "batch.micro_limit: 12 -> 8" in result.stderr
    losses = sctrain.losses(run)
    for images in range(11 * STEP, 21 * STEP, STEP):
        assert losses[images] == pytest.approx(uninterrupted[images], rel=1e-5)


def test_kill_and_resume_is_bit_equal(sctrain, killed, uninterrupted):
    sctrain("train", sctrain.config(killed))
    assert sctrain.losses(killed) == uninterrupted
    status = json.loads((sctrain.folder / killed / "status.json").read_text())
    assert status["state"] == "finished" and status["images"] == 20 * STEP


def test_a_stop_signal_saves_and_the_same_command_goes_on(sctrain, uninterrupted):
    config = sctrain.config("stopped")
    process = sctrain.start("train", config)
    wait_for(sctrain, process, "stopped", 3 * STEP)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "the same command goes on" in err
    assert json.loads((sctrain.folder / "stopped" / "status.json").read_text())["state"] == "stopped"
    sctrain("train", config)
    assert sctrain.losses("stopped") == uninterrupted


def test_an_abandoned_future_is_forgotten(sctrain, killed, uninterrupted):
    """Back to an older checkpoint: what was published after it is not this run's, and is published anew."""
    run = "rewound"
    shutil.copytree(sctrain.folder / "whole", sctrain.folder / run)
    shutil.rmtree(max((sctrain.folder / run / "checkpoints").iterdir()))
    snapshot = sctrain.folder / run / "snapshots" / f"{20 * STEP:012d}" / "manifest.json"
    before = snapshot.read_text()
    sctrain("train", sctrain.config(run, optimizer={"learning_rate": 2e-3}))
    assert snapshot.read_text() != before
    assert sctrain.losses(run)[15 * STEP] == uninterrupted[15 * STEP]
    assert sctrain.losses(run)[20 * STEP] != uninterrupted[20 * STEP]


def test_a_finished_run_has_nothing_left_to_do(sctrain, uninterrupted):
    sctrain("train", sctrain.config("whole"))
    assert sctrain.losses("whole") == uninterrupted


def test_no_process_is_left_behind(sctrain, killed):
    mine = str(sctrain.folder)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                assert mine not in file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
