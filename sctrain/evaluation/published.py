"""Published weights drawn from and scored against the figure that was published of them: evidence at full scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.description import DatasetDescription, LatentDescription
from sctrain.building import blueprint
from sctrain.errors import UserError
from sctrain.evaluation.catalog import Entry
from sctrain.evaluation.frechet import Moments, frechet_distance
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.inception import Inception, load_inception, read_statistics
from sctrain.evaluation.method import Method
from sctrain.imports.published import read_published
from sctrain.imports.run_folder import described

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
STATISTICS = "fid-refs"
VAE = "sd-vae-ft-mse"


@dataclass(frozen=True)
class Verified:
    """What came of an entry. `fid` is None where it was not run, and `why` says what is missing."""

    entry: Entry
    fid: float | None = None
    evaluations: int | None = None
    why: str = ""


def missing(entry: Entry, folder: Path) -> str:
    """What the folder lacks for an entry, in words; empty if nothing."""
    wanted = [folder / entry.file, folder / STATISTICS / entry.statistics, folder / INCEPTION]
    if entry.latents:
        wanted.append(folder / VAE)
    absent = [str(path.relative_to(folder)) for path in wanted if not path.exists()]
    return f"missing {', '.join(absent)}" if absent else ""


def verify(
    entries: Iterable[Entry], folder: Path, device: torch.device, samples: int, seed: int, batch: int
) -> Iterator[Verified]:
    """Each entry's figure of `samples` images, or why there is none. Neighbours of one file share its network."""
    inception: Inception | None = None
    for _, sharing in groupby(entries, key=lambda entry: (entry.file, entry.objective, entry.statistics)):
        group = list(sharing)
        why = missing(group[0], folder)
        if why:
            yield from (Verified(entry, why=why) for entry in group)
            continue
        inception = inception or load_inception(folder / INCEPTION, device)
        reference = read_statistics(folder / STATISTICS / group[0].statistics)
        generator = _generator(group[0], folder, device, batch)
        for entry in group:
            moments, evaluations = _drawn(entry, generator, inception, samples, seed, batch)
            yield Verified(entry, frechet_distance(moments, reference), evaluations)


def _generator(entry: Entry, folder: Path, device: torch.device, batch: int) -> Generator:
    """The network of an entry, without a run folder or data."""
    published = read_published(folder / entry.file, objective=entry.objective)
    about = _about(entry)
    config = described(published, folder / entry.file, str(folder), about)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch": batch})})
    network = blueprint(config, about).skeleton()
    network.load_state_dict(published.weights(network, about.height), assign=True)
    generator = Generator(network.to(device).eval(), config, about, device, 1.0)
    return generator.decoding(folder / VAE if entry.latents else None)


def _about(entry: Entry) -> DatasetDescription:
    """As much of a description of data as drawing needs; nothing was prepared."""
    latents = LatentDescription(encoder=VAE, dtype="float32", content="mean_std", convention="edm2")
    return DatasetDescription.model_construct(
        channels=entry.channels,
        height=entry.side,
        width=entry.side,
        classes=[str(number) for number in range(entry.classes)],
        latents=latents if entry.latents else None,
    )


def _drawn(
    entry: Entry, generator: Generator, inception: Inception, samples: int, seed: int, batch: int
) -> tuple[Moments, int]:
    """Moments of the features of all images, and network evaluations per image; one batch in memory at a time."""
    method = Method(entry.sampler, entry.steps, entry.times)
    evaluations = 0

    def features() -> Iterator[Tensor]:
        nonlocal evaluations
        for first in range(0, samples, batch):
            drawn = generator.draw(method, seed, min(batch, samples - first), first=first)
            if drawn.broken:
                raise UserError(f"{entry.file}: {drawn.broken} images are not finite; they cannot be scored")
            evaluations = drawn.nfe
            yield inception.features(drawn.pixels(generator.space))

    return Moments.over(features()), evaluations
