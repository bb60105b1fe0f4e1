"""The same run for a few steps on random images, on real ranks of this machine: what the plan is compared with."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import Batch
from sctrain import building
from sctrain.bench.memory import Watch, live_bytes
from sctrain.config.objectives import TrigFlowObjective
from sctrain.config.schema import RunConfig
from sctrain.files import write_json
from sctrain.objectives.base import Progress
from sctrain.parts import Parts
from sctrain.planning.cast import guide_config
from sctrain.planning.counting import count
from sctrain.planning.memory import Layout
from sctrain.runs import RunFolder
from sctrain.smoke.data import described
from sctrain.snapshots import publish
from sctrain.zero.ema import ShardedPowerEma
from sctrain.zero.world import World

STEPS = 3  # DeepSpeed traces the first one; the second has the moments
_GATHER_BYTES = 2**26


@dataclass(frozen=True)
class Measured:
    """On rank 0; a bench file is this as JSON."""

    device: str
    ranks: int
    precision: str
    held_bytes: int  # between steps
    peak_bytes: int  # of all live tensors
    step_seconds: float
    flops_per_second: float  # of one rank
    bytes_per_second: float  # that one rank receives in all-gathers


def random_sources(config: RunConfig, folder: Path) -> list[str]:
    """Publish networks of random weights in `folder`; the overrides that make them teacher and guide, as asked for."""
    found = []
    if config.objective.distils:
        found += _random_source(config, "teacher", folder)
    if config.guide is not None:
        found += _random_source(guide_config(config), "guide", folder)
    return found


def _random_source(config: RunConfig, key: str, folder: Path) -> list[str]:
    run, nothing = folder / key, {"teacher": None, "guide": None, "start_from": None}
    source = config.model_copy(update={**nothing, "objective": TrigFlowObjective(), "run_dir": run})
    network, width = building.blueprint(source, described(config)), config.ema.widths[0]
    tracks = {width: ((name, network.draw(name, config.seed)) for name in network.shapes)}
    publish(RunFolder(run).snapshots, 1, tracks, source.model_dump(mode="json"), network.shapes)
    return [f"{key}.run={run}", f"{key}.images=1", f"{key}.ema={width}"]


def measure(config: RunConfig, file: Path) -> None:
    """To be called on every rank; rank 0 writes the bench file."""
    world = World.start(config.runtime)
    try:
        about = described(config)
        parts: Any = Parts(config, world, SimpleNamespace(description=about))  # pyright: ignore[reportArgumentType]
        layout = Layout(config, about, world.size)
        ema = parts.power_ema()
        for number in range(STEPS - 1):
            _step(parts, ema, layout, number)
        held, peak = _memory(parts, ema, layout, world)
        seconds = [_timed(parts, ema, layout, world, STEPS + number) for number in range(3)]
        received = _all_gather_rate(world)
        if world.is_main:
            flops = layout.accumulation * count(config, about, layout.micro, None).flops
            median = statistics.median(seconds)
            device = torch.cuda.get_device_name() if world.device.type == "cuda" else f"CPU, {world.size} ranks"
            measured = Measured(device, world.size, config.precision, held, peak, median, flops / median, received)
            write_json(file, vars(measured))
    finally:
        world.stop()


def _step(parts: Parts, ema: ShardedPowerEma, layout: Layout, number: int) -> None:
    """As the trainer's, on a batch of noise."""
    config, size = layout.config, layout.config.batch.global_size
    before, after = (Progress(config.budget_images // 2 + size * n, config.budget_images) for n in (number, number + 1))
    result = None
    while result is None:
        loss = parts.objective.loss(parts.draw(_batch(layout), before), parts.networks)
        parts.student.backward(loss.per_sample.mean())
        parts.train_beside(loss, config.optimizer.learning_rate)
        del loss
        result = parts.student.step(config.optimizer.learning_rate)
        if result is not None and result.applied:
            parts.weight_norm.apply()
            ema.update(before.images, after.images)
            parts.update_target(before, after, applied=True)


def _batch(layout: Layout) -> Batch:
    micro, about = layout.micro, layout.about
    generator = torch.Generator().manual_seed(0)
    if about.latents is None and about.channels in (1, 3):
        images = torch.randint(0, 256, (micro, *about.shape), generator=generator, dtype=torch.uint8)
    else:
        images = torch.randn(micro, *about.shape, generator=generator)
    positions = torch.arange(micro)
    return Batch(images, positions % len(about.classes), positions, positions)


def _memory(parts: Parts, ema: ShardedPowerEma, layout: Layout, world: World) -> tuple[int, int]:
    """Bytes held before a step, and at its peak."""
    if world.device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(parts, ema, layout, STEPS)
        return held, torch.cuda.max_memory_allocated()
    held = live_bytes()
    with Watch() as watch:
        _step(parts, ema, layout, STEPS)
    return held, held + watch.peak


def _timed(parts: Parts, ema: ShardedPowerEma, layout: Layout, world: World, number: int) -> float:
    world.barrier()
    begin = time.perf_counter()
    _step(parts, ema, layout, number)
    world.barrier()  # which waits for the GPU too
    return time.perf_counter() - begin


def _all_gather_rate(world: World) -> float:
    """Bytes per second that a rank receives."""
    mine = torch.zeros(_GATHER_BYTES // 4 // world.size, device=world.device)
    whole = mine.new_empty(mine.numel() * world.size)
    rates = []
    for _ in range(3):
        world.barrier()
        begin = time.perf_counter()
        dist.all_gather_into_tensor(whole, mine)
        world.barrier()
        rates.append((world.size - 1) * mine.numel() * 4 / (time.perf_counter() - begin))
    return max(statistics.median(rates), 1.0)
