"""`sctrain prepare`: images to shards, and the classifier that evaluation needs."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from data_pipeline.description import DatasetDescription
from data_pipeline.digits import prepare_digits
from data_pipeline.encoding import Output
from data_pipeline.latents import LatentOutput
from data_pipeline.parallel import cores
from data_pipeline.shards import Bar, Job
from data_pipeline.sources.cifar10 import prepare_cifar10
from data_pipeline.sources.folder import prepare_folder
from data_pipeline.sources.ilsvrc import prepare_ilsvrc
from data_pipeline.sources.lsun import prepare_lsun
from data_pipeline.sources.shards import prepare_shards
from data_pipeline.verify import verify_dataset
from sctrain.errors import UserError
from sctrain.reporting.console import say

CLASSIFIER_BYTES = 2**31  # of pixels; the evaluation classifier holds them all in memory
NAMED = 5  # skipped images that are told


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that worker processes end too
    data = _KINDS[args.source](args)
    _tell(args.dest, data)
    if args.verify:
        verdict = verify_dataset(args.dest, args.processes or cores(), progress_bar)
        verdict.require_sound(args.dest)
        say(f"{args.dest}: {verdict.samples:,} samples read again, {verdict.bytes:,} bytes: all as written")
    if _wants_classifier(args, data):
        _train_classifier(args.dest, None if data.latents is None else args.vae)
    return 0


def progress_bar(split: str, total: int, done: int) -> Bar:
    """A bar with the time that is left, where a person watches."""
    return tqdm(desc=split, total=total, initial=done, unit="img", disable=None, leave=False)


def _digits(args: argparse.Namespace) -> DatasetDescription:
    return prepare_digits(args.dest, Job(progress=progress_bar))


def _folder(args: argparse.Namespace) -> DatasetDescription:
    return prepare_folder(
        args.src, args.dest, args.resolution, test_share=args.test_share, output=_output(args), job=_job(args)
    )


def _ilsvrc(args: argparse.Namespace) -> DatasetDescription:
    return prepare_ilsvrc(
        args.src,
        args.dest,
        args.resolution,
        val=args.val,
        val_labels=args.val_labels,
        output=_output(args),
        job=_job(args),
    )


def _cifar10(args: argparse.Namespace) -> DatasetDescription:
    # In one process: these images are tiny and in memory, and sending them to others would take longer.
    return prepare_cifar10(
        args.src, args.dest, one_class=args.one_class, output=_output(args), job=Job(progress=progress_bar)
    )


def _lsun(args: argparse.Namespace) -> DatasetDescription:
    return prepare_lsun(args.src, args.dest, args.resolution, val=args.val, output=_output(args), job=_job(args))


def _shards(args: argparse.Namespace) -> DatasetDescription:
    return prepare_shards(
        args.src,
        args.dest,
        args.resolution,
        label_key=args.label_key,
        unlabelled=args.unlabelled,
        test_share=args.test_share,
        output=_output(args),
        job=_job(args),
    )


_KINDS: dict[str, Callable[[argparse.Namespace], DatasetDescription]] = {
    "digits": _digits,
    "folder": _folder,
    "ilsvrc": _ilsvrc,
    "cifar10": _cifar10,
    "lsun": _lsun,
    "shards": _shards,
}


def _latents(args: argparse.Namespace) -> LatentOutput | None:
    """What --encode vae asks for. UserError where its flags do not go together."""
    if args.encode is None:
        if args.vae is not None or args.flip_variant:
            raise UserError("--vae and --flip-variant are for latents: add --encode vae, or leave them out")
        return None
    if args.vae is None:
        raise UserError("--encode vae needs --vae, the folder of Stable Diffusion's auto-encoder")
    from sctrain.commands.drawing import device  # these need torch, which the worker processes do without
    from sctrain.vae import load_vae

    return LatentOutput(load_vae(args.vae, args.convention, device()), args.flip_variant, args.latent_type)


def _output(args: argparse.Namespace) -> Output:
    return Output(
        image_format=args.format,
        quality=args.quality,
        samples_per_shard=args.samples_per_shard,
        shard_bytes=args.shard_size,
        seed=args.seed,
        limit=args.limit,
        latents=_latents(args),
    )


def _job(args: argparse.Namespace) -> Job:
    return Job(processes=args.processes or cores(), skip_broken=args.skip_broken, progress=progress_bar)


def _tell(dest: str, data: DatasetDescription) -> None:
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in data.splits.items())
    what = "images" if data.latents is None else f"latents ({data.latents.convention})"
    say(f"{dest}: {data.height}x{data.width}, {len(data.classes):,} classes, {what}: {counts}")
    if data.enlarged:
        say(f"{dest}: {data.enlarged:,} images were smaller than the resolution and were enlarged, as ADM does")
    if data.skipped:
        more = f" and {len(data.skipped) - NAMED:,} more" if len(data.skipped) > NAMED else ""
        say(f"{dest}: {len(data.skipped):,} unreadable images left out: {', '.join(data.skipped[:NAMED])}{more}")


def _wants_classifier(args: argparse.Namespace, data: DatasetDescription) -> bool:
    if args.classifier is not None or "test" not in data.splits or data.latents is not None:
        return bool(args.classifier)
    samples = sum(split.samples for split in data.splits.values())
    return samples * data.channels * data.height * data.width <= CLASSIFIER_BYTES


def _train_classifier(dest: str, vae: Path | None) -> None:
    from sctrain.evaluation.extractor import train_extractor  # needs torch, which the worker processes do without

    accuracy = train_extractor(dest, vae)["held_out_accuracy"]
    say(f"{dest}: the evaluation classifier gets {accuracy:.1%} of the test images right")
