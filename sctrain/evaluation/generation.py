"""Images from a published snapshot.

Image number i of a seed has the same noise and the label i % num_classes in every run, so images of teacher and
students can be laid side by side and compared element by element.
"""

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data_pipeline.description import DatasetDescription
from sctrain.building import model_space, parameterization
from sctrain.config.schema import GuideFrom, RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.evaluation.guide import Guide
from sctrain.evaluation.method import Method, guidance_scale, times_of
from sctrain.evaluation.source import Source
from sctrain.files import write_bytes
from sctrain.guidance import guided_by, guided_network
from sctrain.latents import LatentSpace
from sctrain.processes import T_MAX, ModelSpace
from sctrain.runs import RunFolder, image_count_name
from sctrain.sampling import consistency_sample, initial_noise, jump_sample, karras_times, ode_sample
from sctrain.sealed_folder import MANIFEST
from sctrain.snapshots import newest_images, snapshot_config


@dataclass(frozen=True)
class Drawn:
    """Images in model space (N, C, H, W) float32 on the CPU, network evaluations per image, and seconds taken."""

    x: Tensor
    nfe: int
    seconds: float

    @property
    def broken(self) -> int:
        """How many images are not finite."""
        return int((~self.x.isfinite()).flatten(1).any(dim=1).sum())

    def pixels(self, space: ModelSpace) -> Tensor:
        """uint8 (N, C, H, W); what is not a number shows as gray."""
        return space.to_pixels(self.x.nan_to_num())


def labels_of(indices: Tensor, num_classes: int) -> Tensor:
    """Balanced labels of images number `indices`."""
    return indices % num_classes


@dataclass(frozen=True)
class Generator:
    """One network with all that is needed to draw from it."""

    network: nn.Module
    config: RunConfig
    about: DatasetDescription
    device: torch.device
    guidance: float
    guide: Guide | None = None

    @staticmethod
    def of(run: Path, images: int, ema: float, device: torch.device, guidance: float | None = None) -> "Generator":
        """The EMA of relative width `ema` of the snapshot at `images`; UserError if it cannot be guided as asked.

        None is the scale of guidance that the run is evaluated with.
        """
        return Generator.from_source(Source.of(run, ema, images), device, guidance)

    @staticmethod
    def from_source(
        source: Source, device: torch.device, guidance: float | None = None, guide: Guide | None = None
    ) -> "Generator":
        """As `of`; away from the answers of `guide`, where there is one."""
        config = source.config
        scale = guidance_scale(source.place, config, guidance) if guide is None else guide.scale(config, guidance)
        return Generator(source.network().to(device).eval(), config, source.about, device, scale, guide)

    @property
    def space(self) -> ModelSpace:
        return model_space(self.config, self.about)

    def decoding(self, vae: Path | None) -> "Generator":
        """The same, with the auto-encoder in the folder `vae` for its latents; None: the one that the run names.

        It is loaded now: UserError comes before anything is drawn.
        """
        if vae is not None and self.config.data.latents is None:
            raise UserError(f"{self.config.name} draws no latents of a published convention: remove --vae")
        data = self.config.data.model_copy(update={"vae": vae or self.config.data.vae})
        found = replace(self, config=self.config.model_copy(update={"data": data}))
        if isinstance(found.space, LatentSpace):
            found.space.decoder()
        return found

    def draw(self, method: Method, seed: int, count: int, label: int | None = None, first: int = 0) -> Drawn:
        """Images number `first` to first + count - 1 of `seed`; of balanced classes, or all of class `label`."""
        start = time.perf_counter()
        batches = torch.arange(first, first + count).split(self.config.evaluation.batch)
        calls: list[int] = []
        networks = [self.network] if self.guide is None else [self.network, self.guide.module]
        hooks = [n.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0]))) for n in networks]
        x = torch.cat([self._batch(method, seed, indices, label).float().cpu() for indices in batches])
        for hook in hooks:
            hook.remove()
        return Drawn(x, sum(calls) // count, time.perf_counter() - start)

    @torch.no_grad()
    def _batch(self, method: Method, seed: int, indices: Tensor, label: int | None) -> Tensor:
        sigma_data, about = self.config.sigma_data, self.about
        noise = initial_noise(seed, indices, about.shape, sigma_data).to(self.device)
        labels = labels_of(indices, len(about.classes)) if label is None else torch.full_like(indices, label)
        labels = labels.to(self.device)
        if method.sampler == "consistency":
            at = (sigma_data, times_of(self.config, method), seed, indices)
            return consistency_sample(self.F, noise, (labels,), *at, self.config.objective.anchor)
        if method.sampler == "jumps":
            at = (sigma_data, times_of(self.config, method), seed, indices, method.gamma)
            told = self.config.objective.told_the_end
            return jump_sample(self.F, noise, (labels,), *at, told_the_end=told)
        times = karras_times(method.steps, sigma_data, start=method.start)
        return ode_sample(self.F, noise, (labels,), sigma_data, method.steps, method.sampler, times)

    def F(
        self, u: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None = None, end: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """TrigFlow's F at this generator's guidance: guided students are told, diffusion models evaluated twice.

        `end` (B,) is for networks that are told where a jump ends.
        """
        assert guidance is None, "the generator's own"
        network, scale = parameterization(self.config).of(self.network), torch.full_like(t, self.guidance)
        if self.guide is not None:
            return guided_by(network, self.guide.network, scale, self.guide.no_label)(u, t, labels)
        if self.config.objective.guided_scales is not None:
            return network(u, t, labels, scale, end)
        if self.guidance == 1:
            return network(u, t, labels, None, end)
        return guided_network(network, scale, len(self.about.classes))(u, t, labels)


def teacher_solutions(
    teacher: WeightsFrom,
    seed: int,
    count: int,
    folder: Path,
    device: torch.device,
    guidance: float = 1.0,
    start: float = T_MAX,
    guide: GuideFrom | None = None,
) -> Tensor:
    """The teacher's Heun solutions of images 0 to count - 1, in model space; computed once.

    They are kept among the teacher's evaluations, for all its students; in `folder` where those cannot be written to.
    Their noise is the state at the time `start`, where the trajectories of the compared student start too. A distance
    to them is fair only for a student of the same sigma_data and data, which is the caller's affair.
    """
    images = teacher.images if teacher.images is not None else newest_images(teacher.run)
    steps = snapshot_config(teacher.run, images).evaluation.ode_steps
    guide = None if guidance == 1 else guide
    identity = f"{_weights(teacher)} {steps} {seed} {count} {guidance} {start}"
    identity += "" if guide is None else f" {_weights(guide)} {guide.labels}"
    name = f"ode-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    shared = RunFolder(teacher.run).evaluations
    for kept in (shared / name, folder / name):
        if kept.is_file():
            return load_file(kept)["x"]
    source = Source.of(teacher.run, teacher.ema, images)
    lesser = guide and Guide.of(source, Source.of(guide.run, guide.ema, guide.images), guide.labels, device)
    generator = Generator.from_source(source, device, guidance, lesser)
    x = generator.draw(Method("heun", steps, start=start), seed, count).x
    home = shared if os.access(shared if shared.is_dir() else teacher.run, os.W_OK) else folder
    home.mkdir(parents=True, exist_ok=True)
    write_bytes(home / name, save({"x": x}))
    return x


def _weights(source: WeightsFrom) -> str:
    """Which they are, digests included."""
    images = source.images if source.images is not None else newest_images(source.run)
    manifest = RunFolder(source.run).snapshots / image_count_name(images) / MANIFEST
    return f"{manifest.read_text()} {source.ema}"
