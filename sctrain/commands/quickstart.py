"""`sctrain quickstart`: the whole system on real images, from nothing to a report.

prepare -> teacher -> sCD from it -> sCT, each trained by its own ranks and scored by its own worker beside them.
Every part is a process that a lab would start by hand, and every part continues where it stopped: repeat the command
after an interruption.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from launchers.local import start
from sctrain import building
from sctrain.config.loading import load
from sctrain.config.schema import RunConfig
from sctrain.evaluation.report import write_report
from sctrain.reporting.console import say

ROLES = ("teacher", "scd", "sct")


def run(args: argparse.Namespace) -> int:
    """Returns the first exit code that is not 0."""
    recipes = {role: f"{args.recipes}/{role}.yaml" for role in ROLES}
    configs = {role: load(recipe, args.overrides) for role, recipe in recipes.items()}
    workers: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = _sctrain("prepare", "digits", configs["teacher"].data.url)
        for role in ROLES:
            code = code or _train_and_score(role, recipes[role], configs[role], args.overrides, workers)
        for worker in workers if code == 0 else ():
            code = code or worker.wait()
    finally:
        for worker in workers:
            worker.terminate()
    if code:
        return code
    out = configs["teacher"].run_dir.parent
    page = write_report({role: config.run_dir for role, config in configs.items()}, out)
    say(f"done: open {page.resolve()} in a browser; the figures are in {page.with_name('figures.json')}")
    return 0


def _train_and_score(
    role: str, recipe: str, config: RunConfig, overrides: list[str], workers: list[subprocess.Popen]
) -> int:
    """Train one run while a worker scores its snapshots; the worker may outlast the training."""
    workers.append(_worker(config.run_dir))
    if building.is_trained(config):
        say(f"{role}: {config.run_dir} is already trained")
        return 0
    say(f"{role}: training in {config.run_dir}")
    return _sctrain("train", recipe, *overrides)


def _worker(run: Path) -> subprocess.Popen:
    """In the background and with one thread: training has the cores."""
    return start(_command("evaluate", str(run), "--watch"), {**os.environ, "OMP_NUM_THREADS": "1"}, background=True)


def _sctrain(*arguments: str) -> int:
    """Run one command. A request to stop is passed on, and the command gets the time to save."""
    process = subprocess.Popen(_command(*arguments))
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code  # as shells count a child that a signal ended
    except (KeyboardInterrupt, SystemExit):
        process.terminate()
        process.wait()
        raise


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sctrain", *arguments]
