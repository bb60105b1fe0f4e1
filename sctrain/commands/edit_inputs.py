"""What `sctrain edit` checks and reads before a network is built."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.decode import MODES
from data_pipeline.description import DatasetDescription, read_description
from sctrain.building import model_space
from sctrain.commands.drawing import picture_file
from sctrain.config.objectives import ContinuousObjective, LatentConsistency
from sctrain.config.schema import RunConfig
from sctrain.editing.pictures import read_picture
from sctrain.errors import UserError
from sctrain.evaluation.method import start_time
from sctrain.objectives.levels import Grid, ddim_times
from sctrain.processes import ModelSpace, sigma_at, time_at
from sctrain.sampling import karras_times
from sctrain.snapshots import newest_images, snapshot_config


@dataclass(frozen=True)
class Model:
    """The newest snapshot of a run, before its network is built."""

    run: Path
    images: int
    config: RunConfig
    about: DatasetDescription

    @staticmethod
    def of(run: Path) -> "Model":
        """UserError if `run` has no snapshot, or is no consistency model."""
        images = newest_images(run)
        config = snapshot_config(run, images)
        refuse_another_model(run, config)
        return Model(run, images, config, read_description(config.data.url))

    @property
    def space(self) -> ModelSpace:
        return model_space(self.config, self.about)

    @property
    def sigma_min(self) -> float:
        """The least noise level it can be asked at: an LCM's own least; else EDM's, or that of the identity."""
        method = self.config.objective
        if isinstance(method, LatentConsistency):
            return sigma_at(ddim_times(method.ddim_steps)[1].item(), self.config.sigma_data)
        return max(Grid.sigma_min, method.anchor)

    @property
    def start(self) -> float:
        """The time of its greatest noise level: where the process ends that it was trained on."""
        return start_time(self.config)

    def times(self, steps: int) -> list[float]:
        """EDM's grid from `start` down without its end, `steps` times."""
        return karras_times(steps, self.config.sigma_data, self.sigma_min, start=self.start)[:-1]

    def times_of(self, sigmas: Sequence[float]) -> list[float]:
        """Of noise levels that the user gave; UserError if they do not descend, or the model knows none such."""
        top = sigma_at(self.start, self.config.sigma_data)
        for sigma in sigmas:
            if not self.sigma_min <= sigma <= top * (1 + 1e-3):
                levels = f"{self.sigma_min:g} to {top:.4g}"
                raise UserError(f"--sigma {sigma:g} is not a noise level of {self.run}; choose from {levels}")
        if any(later >= earlier for earlier, later in zip(sigmas[:-1], sigmas[1:], strict=True)):
            raise UserError(f"--sigma {' '.join(f'{sigma:g}' for sigma in sigmas)} does not descend; sort the levels")
        return [min(self.start, time_at(sigma, self.config.sigma_data)) for sigma in sigmas]


def refuse_another_model(run: Path, config: RunConfig) -> None:
    """UserError unless the network gives a consistency function: one evaluation from any time to the data."""
    method = config.objective
    if method.samples_as == "diffusion":
        raise UserError(f"{run} is a diffusion model; edit with a consistency model that was distilled from it")
    if method.samples_as == "jumps" and not method.told_the_end:
        raise UserError(f"{run} was trained by '{method.name}', which has no consistency function; edit with another")
    if isinstance(method, ContinuousObjective) and method.segments > 1:
        raise UserError(
            f"{run} jumps to the end of one of {method.segments} segments; edit with a run of objective.segments=1"
        )


def chosen_labels(labels: Sequence[int] | None, model: Model, count: int) -> Tensor:
    """The class of every picture, (count,): one for all or one for each. None means no class, if it knows that."""
    classes = len(model.about.classes)
    if not labels:
        if classes > 1 and not model.config.objective.label_dropout:
            raise UserError(f"{model.run} is told the class of every image; give --class, 0 to {classes - 1}")
        return torch.full((count,), classes if model.config.objective.label_dropout else 0)
    for label in labels:
        if not 0 <= label < classes:
            raise UserError(f"--class {label} is not one of the {classes} classes, 0 to {classes - 1}")
    if len(labels) not in (1, count):
        raise UserError(f"--class has {len(labels)} values for {count} images; give one for all or one for each")
    return torch.tensor(labels).expand(count) if len(labels) == 1 else torch.tensor(labels)


def pictures_of(
    paths: Sequence[Path], about: DatasetDescription, *, also_gray: bool = False, smaller_by: int = 1
) -> Tensor:
    """The user's pictures, uint8 (N, C, H, W) of the model's shape.

    Where gray ones are welcome too they come in three equal channels. All may be smaller by a factor.
    """
    channels, height, width = about.shape
    sizes = dict.fromkeys([(height, width), (height // smaller_by, width // smaller_by)])
    modes = (MODES[channels], "L") if also_gray else (MODES[channels],)
    pictures = [read_picture(path, modes, sizes).expand(channels, -1, -1) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise UserError(f"{path} and {paths[0]} have different sizes; edit those of one size together")
    return torch.stack(pictures)


def check_files(out: Path, results: Sequence[Path], inputs: Sequence[Path]) -> None:
    """UserError if a file to be written is no PNG, or would overwrite what is read."""
    picture_file("--out", out, (".png",))  # which keeps every pixel
    read = {path.resolve() for path in inputs}
    for path in (out, *results):
        if path.resolve() in read:
            raise UserError(f"--out {out} would overwrite {path}, which is to be edited; choose another name")
