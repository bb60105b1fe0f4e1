"""Spikes of the gradient's norm: dropped, counted, rolled back, in the end refused; through the real command line."""

import json

import pytest

GUARD = {"spike_factor": 1.02, "spike_window": 16, "spikes_before_rollback": 3, "max_rollbacks": 2}


@pytest.fixture(scope="module")
def nervous(sctrain):
    """A run for which any norm just above the median is a spike."""
    config = sctrain.config("nervous", guard=GUARD, budget_images=48 * 200)
    return sctrain("train", config, code=2)


def test_the_run_goes_back_twice_and_stops_with_a_sentence(nervous):
    assert nervous.stderr.count("the gradient's norm spiked 3 times: back from") == 2
    assert nervous.stderr.count("resumed") == 2
    assert "after 2 rollbacks: lower optimizer.learning_rate" in nervous.stderr and "Traceback" not in nervous.stderr


def test_counts_are_shown_and_abandoned_samples_are_not_seen_again(sctrain, nervous):
    folder = sctrain.folder / "nervous"
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    images = [line["images"] for line in lines]
    assert images == sorted(set(images)), "no count of images twice"
    assert lines[-1]["guard/rollbacks"] == 2 and lines[-1]["guard/spikes"] > 0
    assert lines[-1]["optimizer/grad_norm_median"] > 0
    rollback = json.loads((folder / "rollback.json").read_text())
    assert rollback["rollbacks"] == 2 and rollback["data_offset"] > 0 and rollback["data_offset"] % 48 == 0


def test_the_same_command_goes_on_behind_the_samples_that_were_left(sctrain, nervous):
    """The return is remembered though the checkpoint is older than it."""
    calm = sctrain.config("nervous", guard={**GUARD, "spike_factor": 0.0}, budget_images=48 * 200)
    with_overrides = sctrain("train", calm, "budget_images=9600", "cadence.checkpoint=4800")
    assert "guard.spike_factor: 1.02 -> 0.0" in with_overrides.stderr
    lines = [json.loads(line) for line in (sctrain.folder / "nervous" / "stats.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 9600 and lines[-1]["guard/rollbacks"] == 2
