"""Each mistake ends in one clear sentence and exit code 2; nothing already saved is lost."""

import fcntl
import re
import shutil
import sys

import pytest

STEP = 48


def refused(sctrain, *arguments) -> str:
    """The one sentence on stderr, without a traceback."""
    err = sctrain(*arguments, code=2).stderr
    assert "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.startswith("sctrain: error: ")]
    assert len(sentences) == 1, err
    return sentences[0]


@pytest.fixture(scope="module")
def short(sctrain):
    """A run of two steps."""
    sctrain("train", sctrain.config("short", budget_images=2 * STEP), "--ranks", 1)
    return "short"


def test_run_folder_of_another_configuration(sctrain, short):
    network = {"name": "dit", "width": 64, "depth": 2, "heads": 2, "patch_size": 2}
    sentence = refused(sctrain, "train", sctrain.config(short, network=network, noise_input="log_sigma"), "--ranks", 1)
    assert "network.width: 32 -> 64" in sentence and "noise_input: 't' -> 'log_sigma'" in sentence
    assert "run_dir" in sentence


def test_folder_in_use(sctrain, short):
    with (sctrain.folder / short / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = sctrain.config(short, budget_images=4 * STEP)
        assert "another process" in refused(sctrain, "train", config, "--ranks", 2)


def test_folder_that_cannot_be_written(sctrain):
    assert "run_dir" in refused(sctrain, "train", sctrain.config("x", run_dir="/proc/no/run"), "--ranks", 1)


def test_batch_that_does_not_divide(sctrain):
    sentence = refused(sctrain, "train", sctrain.config("odd", batch={"global_size": 50}), "--ranks", 3)
    assert "batch.global_size" in sentence and "48" in sentence


def test_damaged_shard(sctrain, digits):
    damaged = sctrain.folder / "damaged"
    shutil.copytree(digits, damaged)
    shard = sorted(damaged.glob("train-*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[700:60_000:512] = bytes(b ^ 0xFF for b in content[700:60_000:512])
    shard.write_bytes(content)
    config = sctrain.config("damaged_run", data={"url": str(damaged), "mean": [0.3], "std": [0.37]})
    assert shard.name in refused(sctrain, "train", config, "--ranks", 1)
    shard.unlink()
    assert shard.name in refused(sctrain, "train", config, "--ranks", 1)


def test_corrupt_checkpoint_names_the_way_back(sctrain, short):
    run = "corrupt"
    shutil.copytree(sctrain.folder / short, sctrain.folder / run)
    newest = max((sctrain.folder / run / "checkpoints").iterdir())
    shard = newest / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
    sentence = refused(sctrain, "train", sctrain.config(run, budget_images=4 * STEP), "--ranks", 1)
    assert shard.name in sentence and "delete the folder" in sentence
    assert newest.is_dir()


def test_what_only_another_rank_meets_is_said_too(sctrain):
    run = "corrupt2"
    sctrain("train", sctrain.config(run, budget_images=2 * STEP), "--ranks", 2)
    newest = max((sctrain.folder / run / "checkpoints").iterdir())
    (newest / "rank-00001.safetensors").write_bytes(b"")
    err = sctrain("train", sctrain.config(run, budget_images=4 * STEP), "--ranks", 2, code=2).stderr
    assert "Traceback" not in err
    assert "sctrain (rank 1): error: " in err and "rank-00001.safetensors" in err and "delete the folder" in err


def test_a_run_that_only_skips_stops(sctrain):
    """Weights blown up by an absurd learning rate: every later gradient is not finite."""
    config = sctrain.config("diverged", optimizer={"learning_rate": 1e30}, guard={"max_skipped_steps": 3})
    sentence = refused(sctrain, "train", config, "--ranks", 1)
    assert "100.0% of the samples" in sentence and "guard.max_dropped_share" in sentence
    sentence = refused(sctrain, "train", config, "--ranks", 1, "guard.max_dropped_share=1")
    assert "non-finite" in sentence and "guard.max_skipped_steps" in sentence


def test_distillation_without_a_trained_teacher(sctrain):
    config = sctrain.config("orphan", objective={"name": "scd"}, teacher={"run": "nowhere", "ema": 0.05})
    assert "nowhere" in refused(sctrain, "train", config, "--ranks", 1)


@pytest.mark.parametrize("launcher", [(), (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")])
def test_runs_that_do_not_fit_are_refused_before_they_are_built(sctrain, short, launcher):
    """By the process that would start the ranks, and by the ranks where another launcher has started them."""
    source, options = {"run": str(sctrain.folder / short), "ema": 0.05}, {}
    if launcher:
        options = {"launcher": (*launcher, "-m", "sctrain")}
    student = sctrain.config("misfit", objective={"name": "scd"}, teacher=source)
    err = sctrain("train", student, code=1 if launcher else 2, **options).stderr
    assert "was trained by 'sct'; a teacher is a diffusion model" in err
    network = {"name": "dit", "width": 32, "depth": 2, "heads": 4, "patch_size": 2}
    start = sctrain.config("misfit", start_from=source, network=network)
    err = sctrain("train", start, code=1 if launcher else 2, **options).stderr
    assert "network.heads 2, this run has 4" in err
    assert not (sctrain.folder / "misfit" / "checkpoints").exists()


def test_lpips_without_its_file(sctrain):
    metric = {"name": "lpips", "weights": "nowhere/vgg16.pth"}
    config = sctrain.config("perceptual", objective={"name": "ct", "metric": metric})
    assert "nowhere/vgg16.pth cannot be read" in refused(sctrain, "train", config, "--ranks", 1)


def test_a_tangent_beyond_its_limit_refuses_to_start(sctrain):
    config = sctrain.config("exact", guard={"tangent_error": 1e-9})
    sentence = refused(sctrain, "train", config)
    assert "differs by" in sentence and "guard.tangent_error" in sentence
    assert not (sctrain.folder / "exact" / "stats.jsonl").read_text()


def test_doctor_verifies_the_tangents_of_a_run(sctrain, short):
    """Of the newest checkpoint where there is one; fresh gates are in doubt, and no reason to fail."""
    trained = sctrain("doctor", sctrain.config(short))
    assert (
        re.search(r"\[ok\] tangent of blocks.0 at \d+ images: error", trained.stdout) and "[??]" not in trained.stdout
    )
    fresh = sctrain("doctor", sctrain.config("never_started"))
    assert "[??] tangent of blocks.0 before the first step: not verified" in fresh.stdout
    assert not (sctrain.folder / "never_started").exists()
    strict = sctrain("doctor", sctrain.config(short), "guard.tangent_error=1e-9", code=2)
    assert "[!!] tangent of" in strict.stdout and "the limit is 1e-09" in strict.stdout
