"""zero_building.py FOLDER: networks built and loaded without being whole anywhere, and what that takes of memory.

The network has many layers of one size: a whole copy is far from a shard and a layer, and one layer more, which the
library that gathers may still hold, is little.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank
import torch
from torch import nn

from sctrain.bench.memory import footprint
from sctrain.blueprint import Blueprint, InitialValues
from sctrain.config.schema import OptimizerConfig
from sctrain.snapshots import open_weights, publish
from sctrain.zero.construction import lay_out
from sctrain.zero.ema import ShardedPowerEma
from sctrain.zero.engine import FrozenEngine, StudentEngine
from sctrain.zero.world import World

WIDTH, LAYERS = 155, 24  # an odd number of elements per layer: shards are padded
STAGES = (3, 0)


def make() -> nn.Module:
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def config(world: World, stage: int, **options: Any) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": WIDTH * WIDTH,
            "reduce_bucket_size": 1,
            **options,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "steps_per_print": 2**31,
    }


def student(world: World, stage: int, seed: int = 5) -> StudentEngine:
    blueprint = Blueprint(make)
    network = lay_out(blueprint, config(world, stage), world.device, trained=True)
    engine = StudentEngine(network, OptimizerConfig(learning_rate=1e-3), config(world, stage))
    engine.shards.fill(InitialValues(blueprint, seed))
    return engine


def digests(ema: ShardedPowerEma) -> dict[str, str]:
    """Of whole weights by name, on rank 0."""
    return {name: hashlib.sha256(whole.numpy().tobytes()).hexdigest() for name, whole in ema.gather(0.1)}


def evaluate(network: Callable) -> float:
    return float(network(torch.linspace(-1, 1, WIDTH).expand(2, WIDTH)).square().mean())


def measured(world: World, folder: Path) -> dict[str, float]:
    """Peak live bytes of building, loading and publishing, over a float32 shard and the largest layer."""
    layer, kept = 4 * WIDTH * WIDTH, []
    shard = 4 * sum(-(-math.prod(shape) // world.size) for shape in Blueprint(make).shapes.values())
    peaks = {}

    def watch(name: str, run: Callable, already: int = 0) -> None:
        peaks[name] = (footprint(lambda: kept.append(run())).peak_bytes - already) / (shard + layer)

    watch("student", lambda: student(world, 3), already=shard)  # its gradients' buffer
    ema = ShardedPowerEma(kept[-1].shards, (0.1,))
    shapes = {shard.name: shard.shape for shard in kept[-1].shards}

    def publish_track() -> None:
        track = ema.gather(0.1)
        if world.is_main:
            publish(folder, 12, {0.1: track}, {}, shapes)
        else:
            list(track)

    watch("publishing", publish_track, already=-shard)  # beside the track
    world.barrier()

    def teacher() -> FrozenEngine:
        network = lay_out(Blueprint(make), config(world, 3), world.device, trained=False)
        engine = FrozenEngine(network, config(world, 3), world.device)
        engine.fill(open_weights(folder, 12, 0.1))
        return engine

    watch("teacher", teacher)
    assert evaluate(kept[-1]) == evaluate(kept[0]), "what was published is what is loaded"
    return peaks


def with_options(world: World) -> dict[str, list[float]]:
    """What frozen networks, which are never stepped, and students give with weights set once, and set again."""
    found = {}
    for name, options in {
        "hpz": {"zero_hpz_partition_size": world.size},
        "cpu": {"offload_param": {"device": "cpu"}},
    }.items():
        blueprint, settings = Blueprint(make), config(world, 3, **options)
        network = lay_out(blueprint, settings, world.device, trained=True)
        trained = StudentEngine(network, OptimizerConfig(), settings)
        frozen = FrozenEngine(lay_out(blueprint, settings, world.device, trained=False), settings, world.device)
        for seed in (7, 5):
            values = InitialValues(blueprint, seed)
            frozen.fill(values)
            trained.shards.fill(values)
            found[f"{name} {seed}"] = [evaluate(frozen), evaluate(trained), evaluate(blueprint.whole(values))]
    return found


def main() -> None:
    folder, world = Path(sys.argv[1]), rank.join()
    engines = {stage: student(world, stage) for stage in STAGES}
    weights = {stage: digests(ShardedPowerEma(engine.shards, (0.1,))) for stage, engine in engines.items()}
    values = {stage: evaluate(engine) for stage, engine in engines.items()}
    whole = Blueprint(make)
    expected = evaluate(whole.whole(InitialValues(whole, 5)))
    peaks = measured(world, folder / str(world.size)) if world.size > 1 else {}
    rank.report(
        {"weights": weights, "values": values, "expected": expected, "peaks": peaks, "options": with_options(world)}
    )
    world.stop()


if __name__ == "__main__":
    rank.run(main)
