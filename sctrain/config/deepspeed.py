"""What DeepSpeed is told. Pure functions: nothing here imports DeepSpeed.

The run description decides everything that it has a key for; the `deepspeed:` mapping adds what it has none for. No
setting is taken from two places: DeepSpeed's name for one of ours is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import merged
from sctrain.errors import UserError

# DeepSpeed's key -> ours.
_DECIDED_ELSEWHERE = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_limit",
    "gradient_accumulation_steps": "batch.micro_limit",
    "gradient_clipping": "optimizer.gradient_clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.ramp_images",
    "bf16.enabled": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "zero_optimization.offload_optimizer": "offload.optimizer",
}
_ROUNDED = "int8 weights are other ones than the EMA and checkpoints have, and tangents are not tested on them"
# DeepSpeed's key -> the values that this trainer works with, and why.
_FIXED = {
    "zero_optimization.stage": ((3, 0), "EMA and checkpoints do not follow the fragments of stages 1 and 2"),
    "zero_optimization.memory_efficient_linear": ((False,), "that linear layer passes no tangents"),
    "zero_optimization.zero_quantized_weights": ((False,), _ROUNDED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _ROUNDED),
    "zero_optimization.zero_quantized_gradients": ((False,), "its kernels are for GPUs, where it is not tested yet"),
    "zero_optimization.mics_shard_size": (
        (-1,),
        "DeepSpeed has removed it; 'zero_hpz_partition_size' gathers in a node",
    ),
    "zero_optimization.offload_param.device": (
        ("none", "cpu"),
        "weights on a disk cannot be set, as EMA and targets do",
    ),
    "fp16": ((), "its loss scale is a state that no checkpoint holds, and bf16 needs none"),
}


def derive_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """(images per rank and micro-batch, micro-batches per step): the fewest that keep within `batch.micro_limit`."""
    size = config.batch.global_size
    if size % world:
        below, above = size // world * world, (size // world + 1) * world
        fitting = f"{below} and {above}" if below else f"{above}"
        raise UserError(
            f"batch.global_size = {size} does not divide among {world} ranks; the nearest that do: {fitting}"
        )
    share = size // world
    fewest = -(-share // config.batch.micro_limit)
    accumulation = next(count for count in range(fewest, share + 1) if share % count == 0)
    return share // accumulation, accumulation


def deepspeed_config(config: RunConfig, world: int, *, gpu: bool = False) -> dict[str, Any]:
    """The complete mapping handed to DeepSpeed on each of `world` ranks. UserError as `refuse_contradictions`."""
    refuse_contradictions(config)
    micro, accumulation = derive_batch(config, world)
    ours = {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,  # RAdam
        "steps_per_print": 2**31,  # the trainer reports itself
    }
    if config.offload.optimizer == "cpu" or (gpu and config.offload.optimizer == "disk"):
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        ours["zero_force_ds_cpu_optimizer"] = False  # the configured one, which needs no compiler
    return merged(ours, config.deepspeed)


def refuse_contradictions(config: RunConfig) -> None:
    """UserError if the `deepspeed:` mapping sets what our own keys decide, or what this trainer cannot do."""
    given = config.deepspeed
    for section in ("zero_optimization", "bf16"):
        if not isinstance(given.get(section, {}), Mapping):
            raise UserError(f"'deepspeed.{section}' must be a mapping of keys to values")
    for key, ours in _DECIDED_ELSEWHERE.items():
        if _lookup(given, key) is not None:
            raise UserError(f"'deepspeed.{key}' is decided by '{ours}'; remove it and set '{ours}' instead")
    for key, (values, reason) in _FIXED.items():
        if _lookup(given, key) not in (None, *values):
            allowed = " or ".join(str(value).lower() for value in values)
            demand = f"must be {allowed}" if values else "is not supported"
            raise UserError(f"'deepspeed.{key}' {demand} ({reason}); remove it")
    if config.offload.optimizer != "device" and _lookup(given, "zero_optimization.stage") == 0:
        raise UserError(
            f"'offload.optimizer' is {config.offload.optimizer}, but ZeRO-0 keeps the whole state on every device; "
            "remove 'deepspeed.zero_optimization.stage'"
        )


def _lookup(given: Mapping[str, Any], dotted: str) -> Any:
    """What is there under the key; None where nothing is, or no mapping on the way to it."""
    found: Any = given
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
