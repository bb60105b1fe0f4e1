"""What DeepSpeed offers and training refuses, with the reason; `tests/distributed` has what it takes."""

from pathlib import Path

import pytest

from sctrain.config.deepspeed import deepspeed_config
from sctrain.config.loading import load
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError

RECIPE = """
name: small
run_dir: runs/small
data: {url: data/digits}
network: {name: dit}
objective: {name: sct}
batch: {global_size: 8}
budget_images: 1Mi
"""
ZERO = "deepspeed.zero_optimization"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["deepspeed.fp16.enabled=true"], "'deepspeed.fp16' is not supported (its loss scale is a state"),
        ([f"{ZERO}.zero_quantized_weights=true"], "must be false (int8 weights are other ones"),
        ([f"{ZERO}.zero_quantized_nontrainable_weights=true"], "must be false (int8 weights are other ones"),
        ([f"{ZERO}.zero_quantized_gradients=true"], "must be false (its kernels are for GPUs"),
        ([f"{ZERO}.mics_shard_size=2"], "must be -1 (DeepSpeed has removed it"),
        (
            [f"{ZERO}.offload_param={{device: nvme, nvme_path: /tmp}}"],
            f"'{ZERO}.offload_param.device' must be none or cpu",
        ),
        ([f"{ZERO}.offload_optimizer={{device: cpu}}"], "is decided by 'offload.optimizer'; remove it and set"),
        ([f"{ZERO}.stage=0", "offload.optimizer=disk"], "'offload.optimizer' is disk, but ZeRO-0 keeps the whole"),
        ([f"{ZERO}.memory_efficient_linear=true"], "memory_efficient_linear' must be false"),
        (["deepspeed.zero_optimization=3"], "'deepspeed.zero_optimization' must be a mapping"),
    ],
)
def test_options_that_are_refused(recipe: Path, overrides: list[str], sentence: str):
    with pytest.raises(UserError) as caught:
        load(recipe, overrides)
    assert str(caught.value).startswith(f"{recipe}: ") and sentence in str(caught.value)


def told(config: RunConfig, *, gpu: bool) -> dict:
    return deepspeed_config(config, 2, gpu=gpu)


@pytest.mark.parametrize(
    ("place", "on_cpu", "on_gpu"), [("device", False, False), ("cpu", True, True), ("disk", False, True)]
)
def test_deepspeed_offloads_what_leaves_a_gpu(recipe: Path, place: str, on_cpu: bool, on_gpu: bool):
    """On a CPU a disk needs nothing of it: the device's memory is the host's."""
    config = load(recipe, [f"offload.optimizer={place}"])
    for gpu, offloads in ((False, on_cpu), (True, on_gpu)):
        given = told(config, gpu=gpu)
        assert given["zero_optimization"].get("offload_optimizer") == ({"device": "cpu"} if offloads else None)
        assert given.get("zero_force_ds_cpu_optimizer", True) == (not offloads)


def test_options_that_are_passed_on(recipe: Path):
    config = load(recipe, [f"{ZERO}.zero_hpz_partition_size=8", f"{ZERO}.offload_param={{device: cpu}}"])
    given = told(config, gpu=True)["zero_optimization"]
    assert given["zero_hpz_partition_size"] == 8 and given["offload_param"] == {"device": "cpu"}
