"""`sctrain sweep`: one description under a grid of values of its keys, each run under several seeds, in one table."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.parallel import cores
from sctrain.bench.comparison import Row, as_json, rows, summary
from sctrain.commands.drawing import picture_file
from sctrain.config.loading import load
from sctrain.errors import UserError
from sctrain.reporting.console import say
from sctrain.reporting.curves import spread_plot
from sctrain.trials import Trial, run_all


def run(args: argparse.Namespace) -> int:
    """Table or rows on stdout; the runs stay in --out, and the same command goes on with what is missing."""
    plot = args.plot or args.out / "sweep.png"
    picture_file("--plot", plot)
    trials = list(_trials(args))
    jobs = args.jobs or cores()
    say(f"{len(trials)} runs in {args.out}, {jobs} side by side; repeat the command to go on")
    failed = run_all(trials, jobs)
    found = rows(trials, {})
    print(json.dumps(as_json(found)) if args.json else summary(found))
    if _draw(found, plot):
        say(f"drawn in {plot}")
    return 1 if failed else 0


def _trials(args: argparse.Namespace) -> Iterator[Trial]:
    axes = [_axis(text) for text in args.vary]
    for point in itertools.product(*axes):
        group = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point)
        for seed in args.seeds:
            folder = args.out / f"{group.replace('/', '_')}-{seed}"
            own = [f"seed={seed}", f"name={group}-{seed}", f"run_dir={folder}"]
            changes = [f"{key}={value}" for key, value in point]
            yield Trial(group, load(args.config, [*args.overrides, *changes, *own]))


def _axis(text: str) -> list[tuple[str, str]]:
    """key=v1,v2 -> (key, v1), (key, v2); commas inside brackets and braces belong to a value."""
    key, equals, values = text.partition("=")
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if not equals or not key or not all(parts):
        raise UserError(f"--vary '{text}': write it as key=v1,v2, for example optimizer.learning_rate=1e-4,3e-4")
    return [(key, part) for part in parts]


def _draw(found: Sequence[Row], path: Path) -> bool:
    """Whether there was anything to draw."""
    points = list(dict.fromkeys(row.method for row in found))
    kinds = list(dict.fromkeys((row.sampler, row.steps) for row in found))
    panels = {}
    for title, name in (("Frechet distance", "fd"), ("distance to the teacher's ODE solution", "ode_distance")):
        panels[title] = {
            f"{sampler}, {steps} step{'s' * (steps > 1)}": [
                [
                    value
                    for row in found
                    if (row.method, row.sampler, row.steps) == (point, sampler, steps)
                    and (value := getattr(row, name)) is not None
                ]
                for point in points
            ]
            for sampler, steps in kinds
        }
    return spread_plot(points, panels, path)
