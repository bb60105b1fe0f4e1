"""`sctrain sample`: draw images from a published snapshot, or an exported model, into one picture."""

import argparse

from sctrain.commands.drawing import PIXELS, device, evaluations, picture_file
from sctrain.errors import UserError
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.guide import Guide
from sctrain.evaluation.method import chosen
from sctrain.evaluation.source import Source
from sctrain.reporting.console import say
from sctrain.reporting.grids import image_grid


def run(args: argparse.Namespace) -> int:
    """By the sampler that fits the run: see `sctrain.evaluation.method`."""
    source = Source.of(args.run, args.ema)
    if args.count < 1:
        raise UserError("--count must be at least 1")
    method = chosen(
        args.run,
        source.config,
        source.images,
        sampler=args.sampler,
        steps=args.steps,
        times=args.times,
        gamma=args.gamma,
    )
    label = _label(source, args.label)
    picture_file("--out", args.out, PIXELS)
    generator = Generator.from_source(source, device(), args.guidance, _guide(source, args)).decoding(args.vae)
    drawn = generator.draw(method, args.seed, args.count, label)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image_grid(generator.space.to_pixels(drawn.x)).save(args.out)
    say(f"{args.out}: {args.count} images by {method.title}, {evaluations(drawn.nfe)} each, {drawn.seconds:.2f} s")
    return 0


def _guide(source: Source, args: argparse.Namespace) -> Guide | None:
    if args.guide is not None:
        return Guide.of(source, Source.of(args.guide, args.guide_ema), args.guide_labels, device())
    for flag, value in (("--guide-ema", args.guide_ema), ("--guide-labels", args.guide_labels)):
        if value is not None:
            raise UserError(f"{flag} is about the run that guides; name it with --guide, or remove {flag}")
    return None


def _label(source: Source, asked: int | str | None) -> int | None:
    """The class to draw, of which one more than there are means none; None: all in turn."""
    count = len(source.about.classes)
    if asked is None:
        return None
    if asked == "none":
        if source.config.objective.label_dropout == 0:
            raise UserError(f"{source.place} was trained without label dropout, so it knows no --class none")
        return count
    if not isinstance(asked, int) or not 0 <= asked < count:
        raise UserError(f"--class {asked} is not one of the {count} classes, 0 to {count - 1}")
    return asked
