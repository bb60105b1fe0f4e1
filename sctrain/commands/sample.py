"""`sctrain sample`: draw images from a published snapshot into one picture."""

import argparse

import torch

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator, Method
from sctrain.reporting.console import say
from sctrain.reporting.grids import image_grid
from sctrain.runs import RunFolder
from sctrain.snapshots import newest, read_config


def run(args: argparse.Namespace) -> int:
    """Consistency models draw in `--steps` evaluations, diffusion models solve their ODE in that many steps of Heun."""
    snapshots = RunFolder(args.run).snapshots
    snapshot = newest(snapshots)
    if snapshot is None:
        raise UserError(f"{args.run} has published no snapshot; train it first, or name another run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ema = args.ema or RunConfig.model_validate(read_config(snapshot)).evaluation.ema[0]
    generator = Generator.of(args.run, int(snapshot.name), ema, device)
    num_classes = len(generator.about.classes)
    if args.label is not None and not 0 <= args.label < num_classes:
        raise UserError(f"--class {args.label} is not one of the {num_classes} classes, 0 to {num_classes - 1}")
    if args.count < 1 or (args.steps or 1) < 1:
        raise UserError("--count and --steps must be at least 1")
    drawn = generator.draw(_method(generator, args.steps), args.seed, args.count, args.label)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image_grid(generator.space.to_pixels(drawn.x)).save(args.out)
    evaluations = "one network evaluation" if drawn.nfe == 1 else f"{drawn.nfe} network evaluations"
    say(f"{args.out}: {args.count} images, {evaluations} each, {drawn.seconds:.2f} s")
    return 0


def _method(generator: Generator, steps: int | None) -> Method:
    if generator.config.objective.name == "trigflow":
        return Method("heun", steps or generator.config.evaluation.ode_steps)
    return Method("consistency", steps or 1)
