"""`sctrain sample`: draw images from a published snapshot into one PNG."""

import argparse
from pathlib import Path

import torch

from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator, Method, labels_of
from sctrain.reporting.console import say
from sctrain.reporting.grids import image_grid
from sctrain.runs import RunFolder
from sctrain.snapshots import newest


def run(args: argparse.Namespace) -> int:
    """Consistency models draw in `--steps` evaluations, diffusion models solve their ODE in that many steps of Heun."""
    snapshots = RunFolder(args.run).snapshots
    images = newest(snapshots)
    if images is None:
        raise UserError(f"{args.run} has published no snapshot; train it first, or name another run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = Generator.of(args.run, images, args.ema, device)
    diffusion = generator.config.objective.name == "trigflow"
    steps = args.steps or (generator.config.evaluation.ode_steps if diffusion else 1)
    method = Method("heun" if diffusion else "consistency", steps)
    drawn = generator.draw(method, args.seed, args.count, args.label)
    out = Path(args.out)
    image_grid(generator.space.to_pixels(drawn.x), columns=10).save(out)
    say(f"{args.count} images in {drawn.nfe} network evaluation{'s' * (drawn.nfe > 1)} each: {out}")
    return 0
