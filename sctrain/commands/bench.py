"""`sctrain bench`: what things cost on this machine, as ratios within one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from data_pipeline.allocator import keep_freed_memory
from launchers.local import run_ranks
from sctrain.bench import attention
from sctrain.bench.attention import AttentionRow, AttentionSettings, default_backends
from sctrain.bench.table import figure, table
from sctrain.commands.drawing import device, picture_file
from sctrain.config.schema import RuntimeConfig
from sctrain.errors import UserError
from sctrain.evaluation.method import TITLES, ema_width
from sctrain.files import write_json
from sctrain.reporting.console import say
from sctrain.snapshots import newest_images, snapshot_config


def run(args: argparse.Namespace) -> int:
    """Figures on stdout, all else on stderr."""
    keep_freed_memory()
    kinds = {
        "step": _bench_step,
        "attention": _bench_attention,
        "data": _bench_data,
        "methods": _bench_methods,
        "precision": _bench_precision,
        "sample": _bench_sample,
    }
    return kinds[args.what](args)


def _bench_step(args: argparse.Namespace) -> int:
    from sctrain.bench.step import measure  # imports DeepSpeed

    settings = _step_settings(args)
    if "RANK" in os.environ:
        from sctrain.zero.world import World

        world = World.start(RuntimeConfig())
        mine = measure(settings, world, world.device)
        if world.is_main:
            write_json(args.rows, [vars(row) for row in mine])
        world.stop()
        return 0
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        say(f"measuring on {ranks} rank{'s' * (ranks > 1)}, {settings.rounds} rounds: this takes minutes")
        if ranks == 1:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            rows += [vars(row) for row in measure(settings, None, device())]
        else:
            code, more = _on_ranks(ranks)
            if code:
                return code
            rows += more
    print(json.dumps(rows) if args.json else _step_table(rows, settings))
    return 0


def _step_settings(args: argparse.Namespace) -> Any:
    from sctrain.bench.step import StepSettings

    settings = StepSettings(**{f.name: getattr(args, f.name) for f in fields(StepSettings)})
    if any(settings.batch % ranks for ranks in args.ranks):
        raise UserError(f"--batch {settings.batch} does not divide among {args.ranks} ranks; choose a multiple")
    if settings.side % 2 or settings.width % (4 * settings.heads):
        raise UserError("--side must be even, and --width a multiple of 4 x --heads")
    if settings.precision == "bf16" and "finite_difference" in settings.engines:
        raise UserError("bf16 rounds finite differences to noise; give --engines single_pass two_pass")
    return settings


def _on_ranks(ranks: int) -> tuple[int, list[dict[str, Any]]]:
    """The same command on several ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "sctrain", *sys.argv[1:], "--ranks", str(ranks), "--rows", str(file)]
        code = run_ranks(command, ranks, os.environ)
        return code, [] if code else json.loads(file.read_text())


def _step_table(rows: Sequence[dict[str, Any]], settings: Any) -> str:
    head = ("step", "engine", "ratio", "range", "limit", "memory", "gathers", "seconds")
    parts = [
        f"{settings.network or f'DiT {settings.width} x {settings.depth}'}, "
        f"{f'{settings.side}^2 pixels' if settings.network else f'{(settings.side // 2) ** 2} tokens'}, "
        f"batch {settings.batch}, {settings.precision}, {settings.rounds} rounds. Ratios to the diffusion step of the "
        f"same ranks and checkpointing; limit: 1 + the additional forwards, a tangent {settings.tangent_share:.2f}."
    ]
    groups = dict.fromkeys((row["ranks"], row["checkpointing"]) for row in rows)
    for ranks, checkpointing in groups:
        lines = [
            (
                row["objective"],
                row["engine"],
                figure(row["ratio_median"], ".3f"),
                f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
                figure(row["limit"]),
                figure(row["memory_ratio"], ".3f"),
                figure(row["gathers"], "d"),
                figure(row["seconds"], ".3f"),
            )
            for row in rows
            if (row["ranks"], row["checkpointing"]) == (ranks, checkpointing)
        ]
        where = "1 rank" if ranks == 1 else f"{ranks} ranks, ZeRO-3"
        parts.append(f"{where}, {'' if checkpointing else 'no '}checkpointing\n{table(head, lines)}")
    return "\n\n".join(parts)


def _bench_attention(args: argparse.Namespace) -> int:
    backends = tuple(args.backends or default_backends(device(), args.precision, args.head_dims[0]))
    settings = AttentionSettings(
        tuple(args.lengths), tuple(args.head_dims), args.batch, args.heads, args.precision, backends, args.rounds
    )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = attention.measure(settings, device())
    print(json.dumps([vars(row) for row in rows]) if args.json else _attention_table(rows, settings))
    return 0


def _attention_table(rows: Sequence[AttentionRow], settings: AttentionSettings) -> str:
    head = ("implementation", "head dim", "length", "seconds", "x its value alone", "x SDPA", "peak MiB")
    lines = [
        (
            row.backend,
            str(row.head_dim),
            str(row.length),
            figure(row.seconds, ".4f"),
            figure(row.ratio_to_value),
            figure(row.ratio_to_sdpa),
            figure(row.peak_bytes / 2**20, ".1f"),
        )
        for row in rows
    ]
    parts = [
        f"Forward of values with tangents: {settings.batch} x {settings.heads} heads, {settings.precision}, "
        f"{settings.rounds} rounds. SDPA is PyTorch's kernel for the value.\n{table(head, lines)}"
    ]
    for backend in settings.backends:
        mine = [row for row in rows if row.backend == backend]
        if len(mine) > 1:
            parts.append(f"{backend}: peak memory grows as length^{attention.growth(mine):.2f}")
    return "\n".join(parts)


def _bench_methods(args: argparse.Namespace) -> int:
    from sctrain.bench import comparison, methods
    from sctrain.trials import run_all

    chosen = tuple(args.methods or methods.METHODS)
    for name in chosen:
        if name not in methods.METHODS:
            raise UserError(f"--methods: '{name}' is none of {', '.join(methods.METHODS)}")
        if methods.STARTS_FROM.get(name, name) not in chosen:
            raise UserError(f"--methods: {name} starts from {methods.STARTS_FROM[name]}; name it too")
    seeds, factor = ([0, 1, 2], 4.0) if args.full else (args.seeds, 1.0)
    found = methods.trials(chosen, seeds, args.recipes, args.out, args.changes, factor)
    cores = len(os.sched_getaffinity(0))
    say(f"{len(found)} runs in {args.out}, {args.jobs or cores} side by side; repeat the command to go on")
    failed = run_all(found, args.jobs or cores)
    say("measuring what a step of each method costs")
    torch.set_num_threads(cores)
    configs = {trial.group: trial.config for trial in found[1:]}
    rows = comparison.rows(found, methods.cost_ratios(configs, args.rounds))
    print(json.dumps(comparison.as_json(rows)) if args.json else comparison.summary(rows))
    return 1 if failed else 0


def _bench_data(args: argparse.Namespace) -> int:
    from sctrain.bench import data

    names = (f.name for f in fields(data.DataSettings))
    settings = data.DataSettings(**{name: getattr(args, name) for name in names})
    if args.generate is not None:
        say(f"writing random latents to {args.url}")
        data.generate(args.url, args.generate)
    say(f"reading it {3 * settings.rounds} times, then for {3 * settings.seconds:.0f} seconds")
    found = data.measure(args.url, settings)
    print(json.dumps(vars(found)) if args.json else data.summary(found))
    return 0


def _bench_precision(args: argparse.Namespace) -> int:
    from sctrain.bench import precision

    ema = ema_width(snapshot_config(args.run, newest_images(args.run)), args.ema)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = precision.measure(args.run, ema, args.rounds, device())
    if args.json:
        print(json.dumps([vars(row) for row in rows]))
        return 0
    head = ("values", "tangents", "value error", "tangent error", "median image", "worst image", "step cost")
    lines = [
        (
            row.value,
            "as values" if row.tangent == "value" else row.tangent,
            *(f"{error:.1e}" for error in (row.value_error, row.tangent_error, row.median, row.largest)),
            f"{row.cost:.2f} x",
        )
        for row in rows
    ]
    layers = [(name, *(f"{row.layers[name]:.1e}" for row in rows)) for name in rows[0].layers]
    print(f"Relative errors against float64 on {precision.IMAGES} images; cost of forward and backward beside fp32.")
    print(table(head, lines))
    print("\nTangent error after each block:")
    print(table(("", *(f"{row.value}, {row.tangent}" for row in rows)), layers))
    return 0


def _bench_sample(args: argparse.Namespace) -> int:
    from sctrain.bench import sampling

    settings = sampling.SampleSettings(
        tuple(args.evaluations), tuple(args.steps), args.samples, args.seed, args.ema, args.guidance
    )
    if settings.samples < 2:
        raise UserError("--samples must be at least 2: a distance compares spreads")
    if args.plot is not None:
        picture_file("--plot", args.plot)
    subjects = sampling.subjects(args.runs, settings)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = sampling.measure(subjects, settings, device())
    if args.plot is not None:
        sampling.plot(rows, args.plot)
        say(f"drawn: {args.plot}")
    print(json.dumps([vars(row) for row in rows]) if args.json else _sample_table(rows, settings))
    return 0


def _sample_table(rows: Sequence[Any], settings: Any) -> str:
    head = ("run", "objective", "sampler", "steps", "evaluations", "Frechet distance", "ms per image")
    lines = [
        (
            row.run,
            row.objective,
            str(TITLES.get(row.sampler, row.sampler)),
            str(row.steps),
            str(row.nfe),
            figure(row.fd),
            figure(1000 * row.seconds_per_image),
        )
        for row in rows
    ]
    broken = sum(row.broken for row in rows)
    notes = f"\n{broken} images are not finite, and were scored as gray." if broken else ""
    return f"{settings.samples} images of seed {settings.seed} per row, on {device()}.\n{table(head, lines)}{notes}"
