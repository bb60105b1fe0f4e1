"""`sctrain data`: what a data set holds, whether it is sound, and what it looks like."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.parallel import cores
from data_pipeline.statistics import statistics
from data_pipeline.verify import verify_dataset
from sctrain.commands.drawing import PIXELS, picture_file
from sctrain.commands.prepare import progress_bar
from sctrain.errors import UserError
from sctrain.evaluation.images import pictures_of
from sctrain.reporting.console import say
from sctrain.reporting.contact_sheet import contact_sheet

MOST_SHOWN = 1024


def run(args: argparse.Namespace) -> int:
    return _KINDS[args.what](args)


def _stat(args: argparse.Namespace) -> int:
    found = statistics(args.url)
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    """The numbers as lines of words."""
    lines = [
        f"{found['name']}: {found['height']}x{found['width']}, {found['channels']} channels, "
        f"{found['classes']:,} classes",
        f"licence      {found['licence']}",
        f"source       {found['source']}",
        f"recipe       {', '.join(f'{key} {_short(value)}' for key, value in found['recipe'].items())}",
        f"mean, std    {_rounded(found['mean'])}, {_rounded(found['std'])}",
        f"left out     {found['skipped']:,} unreadable images; {found['enlarged']:,} were enlarged",
    ]
    for split, about in found["splits"].items():
        lines += ["", *_split_lines(split, about)]
    return lines


def _split_lines(split: str, about: dict[str, Any]) -> list[str]:
    sizes = about["class_sizes"]
    ends = "; ".join(
        f"{which}: " + ", ".join(f"{name} {count:,}" for name, count in sizes[which].items())
        for which in ("smallest", "largest")
    )
    empty = f", {sizes['empty']:,} empty" if sizes["empty"] else ""
    return [
        f"{split}: {about['samples']:,} samples in {about['shards']:,} shards, {_size(about['bytes'])}",
        f"  per class  {_spread(sizes, _count)}{empty}",
        *([f"             {ends}"] if sizes["min"] < sizes["max"] else []),
        f"  shards     {_spread(about['shard_bytes'], _size)}; samples {_spread(about['shard_samples'], _count)}",
        f"  samples    {_spread(about['sample_bytes'], _size)}, tar headers included",
        f"  fingerprint {about['fingerprint']}",
    ]


def _short(value: str | int | float) -> str:
    """Digests by their beginning: they are there to be compared, and --json has them whole."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _spread(values: dict[str, Any], text: Callable[[float], str]) -> str:
    return f"{text(values['min'])} to {text(values['max'])}, median {text(values['median'])}"


def _count(count: float) -> str:
    return f"{count:,.0f}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"


def _rounded(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def _verify(args: argparse.Namespace) -> int:
    verdict = verify_dataset(args.url, args.processes or cores(), progress_bar)
    if args.json:
        print(json.dumps(asdict(verdict), indent=2))
    verdict.require_sound(args.url)
    say(f"{args.url}: {verdict.samples:,} samples, {verdict.bytes:,} bytes: all sound")
    return 0


def _show(args: argparse.Namespace) -> int:
    picture_file("--out", args.out, PIXELS)
    if args.count > MOST_SHOWN:
        raise UserError(f"--count {args.count} is too many for one picture; {MOST_SHOWN} is the most")
    dataset = open_dataset(args.url, args.split)
    chosen = _choose(dataset, args)
    if dataset.description.latents is not None and args.vae is None:
        raise UserError(f"{args.url} holds latents, not images: give --vae, the folder of their decoder")
    pictures = pictures_of(dataset, args.vae)
    images, labels = pictures.read(chosen)
    about = pictures.description
    names = about.classes
    title = f"{about.name}  ·  {args.split}  ·  {about.width}x{about.height}  ·  {len(dataset):,} images"
    sheet = contact_sheet(images, [names[label] for label in labels.tolist()], title)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out)
    say(f"{args.out}: {len(chosen)} of {len(dataset):,} images")
    return 0


def _choose(dataset: ShardedDataset, args: argparse.Namespace) -> np.ndarray:
    """Sample ids (M,) drawn without replacement, sorted by class."""
    labels, names = dataset.index.label, dataset.description.classes
    candidates = np.arange(len(dataset)) if args.label is None else np.flatnonzero(labels == _number(args.label, names))
    if not len(candidates):
        raise UserError(
            f"--class {args.label} has no images in the split {args.split}; `sctrain data stat` lists sizes"
        )
    chosen = np.random.default_rng(args.seed).permutation(candidates)[: args.count]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def _number(text: str, names: list[str]) -> int:
    """The class of this name, or of this number."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise UserError(f"--class {text} is neither a class's name nor a number from 0 to {len(names) - 1}")


_KINDS = {"stat": _stat, "verify": _verify, "show": _show}
