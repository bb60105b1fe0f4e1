"""`sctrain plan`: does a run fit on so many GPUs, how fast would it be, and what to change if it does not fit."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launchers.local import run_ranks
from sctrain.bench.table import table
from sctrain.config.loading import load
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.planning.cast import STUDENT, guide_is_there
from sctrain.planning.choice import ROOM, Plan, fitting, plan
from sctrain.planning.memory import Layout
from sctrain.planning.speed import GPUS_PER_NODE, Hardware
from sctrain.reporting.console import say
from sctrain.smoke.data import described

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def run(args: argparse.Namespace) -> int:
    """Figures on stdout; 2 and a sentence where nothing fits."""
    config = load(args.config, args.overrides)
    if "RANK" in os.environ:
        from sctrain.planning.measuring import measure  # imports DeepSpeed

        measure(config, args.measure)
        return 0
    nodes = args.nodes or -(-args.gpus // GPUS_PER_NODE)
    if args.gpus % nodes:
        raise UserError(f"--gpus {args.gpus} do not divide among --nodes {nodes}; give the number of all GPUs")
    layout = Layout(config, described(config), args.gpus)
    measured: dict[str, Any] | None = None
    if args.measure is not None:
        measured = _measured(args, config)
        args.bench = args.measure
        layout = replace(layout, device="cuda" if torch.cuda.is_available() else "cpu")
    hardware = Hardware.assumed(config, nodes) if args.bench is None else Hardware.read(args.bench, config)
    room = ROOM * args.gpu_memory
    found = plan(layout, hardware)
    suggested = None if found.fits(room) else fitting(layout, hardware, room)
    plans = [found] if suggested is None else [found, suggested]
    if args.json:
        print(
            json.dumps({"parameters": layout.parameters, "plans": [_row(p, room) for p in plans], "measured": measured})
        )
    else:
        print("\n\n".join([_head(args, layout, nodes), *(_words(p, room) for p in plans)]))
        if measured is not None:
            print(f"\nmeasured on {measured['device']}: peak {_size(measured['peak_bytes'])}")
    if not plans[-1].fits(room):
        raise UserError(
            f"{args.config} does not fit on {args.gpus} GPUs of {_size(args.gpu_memory)}, even with checkpointing and "
            "one image at a time: give it more GPUs, or a smaller network"
        )
    return 0


def _measured(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """By the same command on the ranks of this machine."""
    say(f"measuring on {args.gpus} ranks of this machine")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.overrides, f"runtime.ranks={args.gpus}"]
        if config.teacher is not None or config.start_from is not None:
            from sctrain.planning.measuring import random_sources

            overrides += [*random_sources(config, Path(folder)), "start_from=null"]
        command = [sys.executable, "-m", "sctrain", "plan", args.config, *overrides, "--gpus", str(args.gpus)]
        if run_ranks([*command, "--measure", str(args.measure.absolute())], args.gpus, os.environ):
            raise UserError("the ranks ended early; their own message above says why")
    return json.loads(args.measure.read_text())


def _row(found: Plan, room: float) -> dict[str, Any]:
    layout = found.layout
    return {
        "changes": list(found.changes),
        "fits": found.fits(room),
        "stage": layout.stage,
        "micro_batch": layout.micro,
        "micro_batches_per_step": layout.accumulation,
        "checkpointing": layout.config.compute.checkpointing,
        "held_bytes": found.memory.held,
        "micro_batch_bytes": found.memory.micro_batch,
        "optimizer_step_bytes": found.memory.optimizer,
        "elsewhere_bytes": found.memory.elsewhere,
        "peak_bytes": found.memory.peak,
        "step_seconds": found.speed.seconds,
        "images_per_second": found.speed.images_per_second,
        "flops_per_step": found.speed.flops,
        "received_bytes_per_step": found.speed.sent,
        "speed_source": found.speed.source,
    }


def _head(args: argparse.Namespace, layout: Layout, nodes: int) -> str:
    where = f"{args.gpus} GPUs of {_size(args.gpu_memory)} in {nodes} node{'s' * (nodes > 1)}"
    others = ", ".join(
        f"{part} {sum(numels) / 1e6:,.1f} M" for part, numels in layout.numels.items() if part != STUDENT
    )
    lines = [f"{args.config}: {layout.parameters / 1e6:,.1f} M parameters on {where}"]
    lines += [f"beside it: {others}"] if others else []
    if layout.config.guide is not None and not guide_is_there(layout.config):
        lines.append(f"{layout.config.guide.run} is not there yet, so the guide is taken to be as large as the student")
    return "\n".join(lines)


def _words(found: Plan, room: float) -> str:
    layout, memory, speed = found.layout, found.memory, found.speed
    title = "as it is" if not found.changes else "with " + " ".join(found.changes)
    rows = [(name, _size(size)) for name, size in memory.held.items() if size]
    busy, step = sum(memory.micro_batch.values()), memory.optimizer
    rows += [(name, _size(size)) for name, size in memory.micro_batch.items()] if busy >= step else []
    rows += [("optimizer's step", _size(step))] if step > busy else []
    rows.append(("peak", f"{_size(memory.peak)}  {'fits' if found.fits(room) else 'DOES NOT FIT'} in {_size(room)}"))
    kept = "checkpointed" if layout.config.compute.checkpointing else "all activations kept"
    lines = [
        f"{title}: ZeRO-{layout.stage}, {layout.accumulation} x {layout.micro} images per rank and step, {kept}",
        table(("per rank", ""), rows),
        "elsewhere, per rank: " + ", ".join(f"{name} {_size(size)}" for name, size in memory.elsewhere.items()),
        f"step {speed.seconds:.3g} s, {speed.images_per_second:,.0f} images/s ({speed.source}); "
        f"{speed.flops / 1e12:,.1f} TFLOP and {_size(speed.sent)} received per rank and step",
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    scale, unit = next((scale, unit) for scale, unit in _UNITS if abs(count) >= scale or unit == "B")
    return f"{count / scale:.1f} {unit}"
