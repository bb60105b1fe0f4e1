"""`sctrain smoke`: recipes, shrunk, through their whole lives on the CPU; the full networks are only counted."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from launchers.local import run_ranks
from sctrain import cli
from sctrain.commands import sample
from sctrain.config.loading import load
from sctrain.config.recipes import recipe_names
from sctrain.config.schema import RuntimeConfig
from sctrain.errors import UserError
from sctrain.reporting.console import say


def run(args: argparse.Namespace) -> int:
    """All recipes run, whatever becomes of the first ones; exit code 2 if one of them failed."""
    recipes = args.recipes or recipe_names()
    for recipe in recipes:
        load(recipe)  # refuses before anything starts
    if "RANK" in os.environ:
        return _smoke(recipes, args.debug)
    flags = ["--debug"] if args.debug else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return run_ranks([sys.executable, "-m", "sctrain", *flags, "smoke", *recipes], 1, environment)


def _smoke(recipes: list[str], debug: bool) -> int:
    from sctrain.smoke.life import Smoke  # imports DeepSpeed, which the process that only starts ranks need not
    from sctrain.zero.world import World

    logging.disable(logging.WARNING)  # DeepSpeed's remarks about every optimizer
    world = World.start(RuntimeConfig(threads=1))  # for networks this small, more only wait for each other
    failures = []
    try:
        with tempfile.TemporaryDirectory(prefix="sctrain-smoke-") as folder:
            smoke = Smoke(Path(folder), world)
            for recipe in recipes:
                try:
                    say(f"[ok] {recipe}: {_live(smoke, recipe)}")
                except UserError as error:
                    if debug:
                        raise
                    say(f"[!!] {recipe}: {error}")
                    failures.append(f"{recipe}: {error}")
    finally:
        world.stop()
    if failures:
        raise UserError("\n".join(failures))
    return 0


def _live(smoke, recipe: str) -> str:
    from sctrain.smoke.life import step
    from sctrain.smoke.shrinking import lacks_backbone

    start, config = time.perf_counter(), load(recipe)
    lived = smoke.live(config, recipe)
    with step("sampling"):
        picture = lived.shrunk.run_dir / "samples.png"
        sample.run(cli.parse(["sample", str(lived.shrunk.run_dir), "--count", "6", "--out", str(picture)]))
        if np.ptp(np.asarray(Image.open(picture))[8:56, 8:56]) == 0:
            raise UserError("the images are of one colour")
    note = "; l2 in place of lpips, whose backbone is not here" if lacks_backbone(config.objective) else ""
    return (
        f"{lived.parameters / 1e6:.1f} M parameters; shrunk: {lived.steps} steps, resumed at {lived.resumed_at} "
        f"images, parameters moved, sampled; {time.perf_counter() - start:.1f} s{note}"
    )
