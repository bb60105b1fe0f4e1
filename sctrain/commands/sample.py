"""`sctrain sample`: draw images from a published snapshot into one picture."""

import argparse

from data_pipeline.description import read_description
from sctrain.commands.drawing import PIXELS, device, evaluations, picture_file
from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import chosen, ema_width
from sctrain.reporting.console import say
from sctrain.reporting.grids import image_grid
from sctrain.snapshots import newest_images, snapshot_config


def run(args: argparse.Namespace) -> int:
    """By the sampler that fits the run: see `sctrain.evaluation.method`."""
    images = newest_images(args.run)
    config = snapshot_config(args.run, images)
    if args.vae is not None and config.data.latents is None:
        raise UserError(f"{args.run} draws images, not latents of a published convention: remove --vae")
    if args.count < 1:
        raise UserError("--count must be at least 1")
    method = chosen(
        args.run, config, images, sampler=args.sampler, steps=args.steps, times=args.times, gamma=args.gamma
    )
    num_classes = len(read_description(config.data.url).classes)
    if args.label is not None and not 0 <= args.label < num_classes:
        raise UserError(f"--class {args.label} is not one of the {num_classes} classes, 0 to {num_classes - 1}")
    picture_file("--out", args.out, PIXELS)
    generator = Generator.of(args.run, images, ema_width(config, args.ema), device(), args.guidance, args.vae)
    drawn = generator.draw(method, args.seed, args.count, args.label)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image_grid(generator.space.to_pixels(drawn.x)).save(args.out)
    say(f"{args.out}: {args.count} images by {method.title}, {evaluations(drawn.nfe)} each, {drawn.seconds:.2f} s")
    return 0
