"""`sctrain prepare`: images to shards, and the classifier that evaluation needs."""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from data_pipeline.digits import prepare_digits
from data_pipeline.folder import prepare_folder
from data_pipeline.shards import Source
from sctrain.evaluation.extractor import train_extractor
from sctrain.reporting.console import say


def run(args: argparse.Namespace) -> int:
    if args.source == "digits":
        data = prepare_digits(args.dest)
    else:
        data = prepare_folder(args.src, args.dest, args.resolution, progress=_progress)
    counts = ", ".join(f"{split.samples} {name}" for name, split in data.splits.items())
    say(f"{args.dest}: {data.height}x{data.width}, {len(data.classes)} classes, images: {counts}")
    accuracy = train_extractor(str(args.dest))["held_out_accuracy"]
    say(f"{args.dest}: the evaluation classifier gets {accuracy:.1%} of the test images right")
    return 0


def _progress(sources: Sequence[Source]) -> tqdm:
    return tqdm(sources, unit="img", disable=None, leave=False)
