"""Plans beside what two real ranks take: peak bytes of live tensors, three sizes, within a tenth."""

import json

import pytest

SIZES = {
    "small": {"network": {"name": "dit", "width": 64, "depth": 3, "heads": 2}},
    "checkpointed": {
        "network": {"name": "dit", "width": 128, "depth": 4, "heads": 4},
        "compute": {"checkpointing": True},
        "precision": "bf16",
    },
    "distilled": {
        "network": {"name": "dit", "width": 192, "depth": 6, "heads": 6},
        "objective": {"name": "scd"},
        "teacher": {"run": "runs/none", "ema": 0.05},
    },
    "five networks": {
        "network": {"name": "dit", "width": 128, "depth": 4, "heads": 4},
        "objective": {"name": "scd", "guidance": {}, "vsd": {}},
        "teacher": {"run": "runs/none", "ema": 0.05},
        "guide": {"run": "runs/guide", "ema": 0.05},
    },
}


@pytest.mark.parametrize("size", SIZES)
def test_a_plan_is_what_two_ranks_take(sctrain, size):
    keys = {
        "data": {"url": "data/cifar10", "mean": [0.5], "std": [0.25]},
        "batch": {"global_size": 16, "micro_limit": 4},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 100_000}},
    }
    config = sctrain.config(size, **{**keys, **SIZES[size]})
    bench = sctrain.folder / f"{size}.json"
    found = json.loads(sctrain("plan", config, "--gpus", 2, "--measure", bench, "--json").stdout)
    (plan,), measured = found["plans"], found["measured"]
    assert plan["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.1)
    assert sum(plan["held_bytes"].values()) == pytest.approx(measured["held_bytes"], rel=0.1)
    again = json.loads(sctrain("plan", config, "--gpus", 2, "--bench", bench, "--json").stdout)["plans"][0]
    assert "CPU" in again["speed_source"] and again["step_seconds"] > 0
