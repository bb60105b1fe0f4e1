"""`sctrain sample`: draw images from a published snapshot into one picture."""

import argparse

import torch
from PIL import Image

from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator, Method
from sctrain.power_ema import MAX_WIDTH
from sctrain.reporting.console import say
from sctrain.reporting.grids import image_grid
from sctrain.snapshots import newest_images, snapshot_config


def run(args: argparse.Namespace) -> int:
    """Consistency models draw in `--steps` evaluations, diffusion models solve their ODE in that many steps of Heun."""
    images = newest_images(args.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ema = snapshot_config(args.run, images).evaluation.ema[0] if args.ema is None else args.ema
    if not 0 < ema < MAX_WIDTH:
        raise UserError(f"--ema {ema} is not a relative width between 0 and {MAX_WIDTH:.3f}")
    generator = Generator.of(args.run, images, ema, device, args.guidance)
    num_classes = len(generator.about.classes)
    if args.label is not None and not 0 <= args.label < num_classes:
        raise UserError(f"--class {args.label} is not one of the {num_classes} classes, 0 to {num_classes - 1}")
    if args.guidance is not None and args.guidance < 0:
        raise UserError(f"--guidance {args.guidance} is negative; 1 is no guidance, more follows the class more")
    if args.count < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--count and --steps must be at least 1")
    if args.out.suffix.lower() not in Image.registered_extensions():
        raise UserError(
            f"--out {args.out} has no ending of a picture; write for example {args.out.with_suffix('.png')}"
        )
    drawn = generator.draw(_method(generator, args.steps), args.seed, args.count, args.label)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image_grid(generator.space.to_pixels(drawn.x)).save(args.out)
    evaluations = "one network evaluation" if drawn.nfe == 1 else f"{drawn.nfe} network evaluations"
    say(f"{args.out}: {args.count} images, {evaluations} each, {drawn.seconds:.2f} s")
    return 0


def _method(generator: Generator, steps: int | None) -> Method:
    if generator.config.objective.samples_as == "diffusion":
        return Method("heun", steps or generator.config.evaluation.ode_steps)
    return Method("consistency", steps or 1)
