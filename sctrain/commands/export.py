"""`sctrain export`: one EMA of a run as a folder of its own."""

import argparse

from sctrain.errors import UserError
from sctrain.evaluation.method import ema_width
from sctrain.exporting.writing import export
from sctrain.exports import is_export
from sctrain.reporting.console import say
from sctrain.snapshots import newest_images, snapshot_config


def run(args: argparse.Namespace) -> int:
    if is_export(args.run):
        raise UserError(f"{args.run} is an exported model already; name the run folder that it came from")
    images = newest_images(args.run) if args.images is None else args.images
    ema = ema_width(snapshot_config(args.run, images), args.ema)
    export(args.run, images, ema, args.format, args.to)
    say(f"{args.to}: the EMA of width {ema:g} at {images:,} images, as {args.format}")
    return 0
