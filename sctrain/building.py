"""From a run description to its parts: data, model space, networks with their initial weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline import storage
from data_pipeline.cache import CacheOptions
from data_pipeline.description import DatasetDescription
from data_pipeline.latents import CONVENTIONS
from data_pipeline.loader import ShardedDataset, open_dataset
from data_pipeline.storage import StorageSettings
from models.execution import Execution
from models.layers import Conditioning
from models.registry import build_network
from models.score import Score
from models.tangent.engines import tangent_engine
from models.tangent.recorded import recorded
from sctrain.blueprint import Blueprint, InitialValues, Values
from sctrain.config.loading import difference
from sctrain.config.objectives import Diffusion
from sctrain.config.schema import RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.latents import LatentSpace
from sctrain.parameterization import Parameterization
from sctrain.processes import ModelSpace
from sctrain.runs import RunFolder, is_finished
from sctrain.snapshots import StoredWeights, open_weights
from sctrain.sources import described, pinned, start_weights

# The weighting head belongs to one objective; another run starts with a fresh one (sCM section 4.2).
_BELONGS_TO_THE_RUN = ("weighting.",)
# What a network is told beside time and class: fresh where the one it starts from was not told it.
_MAY_BE_NEW = ("condition.guidance.", "condition.end.", "condition.augmentation.")


def is_trained(config: RunConfig) -> bool:
    """Whether this very run is finished; a changed description is for `train` to refuse or to go on with."""
    folder = RunFolder(config.run_dir)
    return is_finished(folder) and not difference(folder.saved_config(), pinned(config))


def use_storage(config: RunConfig) -> None:
    """Let this process, and those that it starts for data, ask stores as the run says."""
    about = config.data.storage
    settings = StorageSettings(about.timeout_seconds, about.retry_budget_seconds, about.parallel)
    if settings != storage.settings():  # or what is under way would be given up
        storage.configure(settings)


def open_split(config: RunConfig) -> ShardedDataset:
    """The data of the run, read as it says from now on."""
    use_storage(config)
    data = config.data
    folder = None if data.cache_folder is None else str(data.cache_folder)
    cache = CacheOptions(folder, data.cache_bytes)
    return open_dataset(data.url, data.split, cache=cache, tolerate_loss=data.on_lost_shard == "replace")


def model_space(config: RunConfig, data: DatasetDescription) -> ModelSpace:
    """Pixels, or latents as they are, to x of standard deviation sigma_data."""
    _refuse_another_convention(config, data)
    for key in ("mean", "std"):
        if len(getattr(config.data, key)) not in (1, data.channels):
            raise UserError(
                f"data.{key} has {len(getattr(config.data, key))} values for images of {data.channels} channels"
            )
    at = (tuple(config.data.mean), tuple(config.data.std), config.sigma_data)
    if data.latents is None:
        return ModelSpace(*at)
    return LatentSpace(*at, 1.0, config.data.vae, config.data.latents)


def _refuse_another_convention(config: RunConfig, data: DatasetDescription) -> None:
    """UserError unless the run takes the latents for what they are."""
    stored = None if data.latents is None else data.latents.convention
    theirs, ours = stored if stored in CONVENTIONS else None, config.data.latents
    if theirs == ours:
        return
    if data.latents is None:
        raise UserError(f"data.latents is {ours}, but {config.data.url} holds images: remove it, or prepare latents")
    if theirs is None:
        raise UserError(f"{config.data.url} holds latents of convention '{stored}', not {ours}: remove 'data.latents'")
    raise UserError(
        f"{config.data.url} holds latents of convention {theirs}, this run has data.latents "
        f"{ours or 'none'}: set it to {theirs}, for the same image is another x"
    )


def blueprint(
    config: RunConfig, data: DatasetDescription, within: Callable[[nn.Module], nn.Module] = lambda network: network
) -> Blueprint:
    """The configured network for these data, without weights; `within` makes what it is a part of."""
    execution = Execution(config.compute.attention, config.compute.checkpointing, config.compute.compile)
    shape, about = (data.channels, data.height, data.width), told(config, data)
    try:
        return Blueprint(lambda: within(build_network(config.network, *shape, about, execution)))
    except ValueError as error:
        raise UserError(str(error)) from error


def fresh_network(config: RunConfig, data: DatasetDescription) -> nn.Module:
    """The configured network for these data, whole, with the initial weights of the run's seed."""
    network = blueprint(config, data)
    return network.whole(InitialValues(network, config.seed))


def told(config: RunConfig, data: DatasetDescription) -> Conditioning:
    """What the network of this run is told beside the time."""
    method = config.objective
    return Conditioning(
        len(data.classes),
        guided=method.guided_scales is not None,
        jumps=method.told_the_end,
        augmented=isinstance(method, Diffusion) and method.augmentation > 0,
    )


def parameterization(config: RunConfig) -> Parameterization:
    """How the output of this run's network becomes F."""
    return Parameterization(config.sigma_data, config.noise_input, config.objective.anchor, config.network_output)


def tangent_of(config: RunConfig) -> Callable[..., Any]:
    """How this run differentiates its network along a direction."""
    if config.objective.records_tangents:
        return recorded
    wide = torch.float32 if config.compute.tangent_precision == "fp32" else None
    return tangent_engine(config.compute.tangent_engine, wide)


def teacher_network(config: RunConfig, data: DatasetDescription) -> tuple[Blueprint, Values]:
    """The teacher of a distillation."""
    source = config.teacher
    assert source is not None, "asked for by its method"
    return _frozen_network(config, data, source)


def guide_network(config: RunConfig, data: DatasetDescription) -> tuple[Blueprint, Values]:
    """What the teacher is guided by: of a shape of its own."""
    source = config.guide
    assert source is not None, "asked for where there is one"
    return _frozen_network(config, data, source)


def _frozen_network(config: RunConfig, data: DatasetDescription, source: WeightsFrom) -> tuple[Blueprint, Values]:
    """That of another run, evaluated as this one says."""
    theirs = described(source)
    own = {"network": theirs.network, "objective": theirs.objective}
    network = blueprint(config.model_copy(update=own), data)
    return network, _fitting(network, snapshot_weights(source), source.run)


def guide_label(config: RunConfig, data: DatasetDescription) -> int | None:
    """The label that the guide is told; None: that of the sample."""
    assert config.guide is not None, "asked for where there is one"
    return len(data.classes) if config.guide.labels == "none" else None


def score_network(config: RunConfig, data: DatasetDescription) -> tuple[Blueprint, Values]:
    """The network that learns the score of what the student draws; at first it says the teacher's."""
    assert config.teacher is not None, "asked for by its method"
    inner, outer = blueprint(config, data), blueprint(config, data, Score)
    return outer, _Inside(_started(config, inner, config.teacher), InitialValues(outer, config.seed))


def source_parameterization(source: WeightsFrom) -> Parameterization:
    """How the output of another run's network becomes F."""
    return parameterization(described(source))


def trained_network(config: RunConfig, data: DatasetDescription, source: WeightsFrom) -> nn.Module:
    """A network with the EMA weights of another run, whole; its shape must be this run's."""
    return network_with(config, data, snapshot_weights(source), source.run)


def network_with(config: RunConfig, data: DatasetDescription, weights: StoredWeights, origin: Path) -> nn.Module:
    """A network with these weights, which `origin` holds, whole; UserError if they are not of its shape."""
    network = blueprint(config, data)
    return network.whole(_fitting(network, weights, origin))


def snapshot_weights(source: WeightsFrom) -> StoredWeights:
    """EMA weights by parameter name."""
    return open_weights(RunFolder(Path(source.run)).snapshots, source.images, source.ema)


def first_values(config: RunConfig, network: Blueprint) -> Values:
    """What the weights of a run are at first: drawn, or those of another run as far as it has them."""
    source = start_weights(config)
    return InitialValues(network, config.seed) if source is None else _started(config, network, source)


def _started(config: RunConfig, network: Blueprint, source: WeightsFrom) -> Values:
    """Weights of another run, fresh ones for what belongs to the run and for what only one of the two is told."""
    fresh, weights = InitialValues(network, config.seed), snapshot_weights(source)
    names = network.shapes.keys() | weights.shapes.keys()
    new = {n for n in names if n.startswith(_MAY_BE_NEW) and (n in network.shapes) != (n in weights.shapes)}
    new |= {name for name in names if name.startswith(_BELONGS_TO_THE_RUN)}
    return _Mixed(new, fresh, _fitting(network, weights, source.run, but=new))


@dataclass(frozen=True)
class _Mixed:
    """Some weights fresh, the others those of another run."""

    new: set[str]
    fresh: Values
    stored: Values

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return (self.fresh if name in self.new else self.stored).read(name, start, stop)


@dataclass(frozen=True)
class _Inside:
    """Those of a network that is a part of another, `network`, and the fresh ones of the rest."""

    network: Values
    fresh: Values

    def read(self, name: str, start: int, stop: int) -> Tensor:
        values = self.network if name.startswith("network.") else self.fresh
        return values.read(name.removeprefix("network."), start, stop)


def _fitting(network: Blueprint, weights: StoredWeights, origin: Path, but: set[str] = frozenset()) -> StoredWeights:  # pyright: ignore[reportArgumentType]
    """The same weights; UserError names the first parameter that is missing or of another shape."""
    for name in sorted((network.shapes.keys() | weights.shapes.keys()) - but):
        ours, theirs = network.shapes.get(name), weights.shapes.get(name)
        if ours is None or theirs is None or ours != theirs:
            shapes = " and ".join("absent" if shape is None else str(shape) for shape in (ours, theirs))
            raise UserError(
                f"{origin}: parameter {name} is {shapes} here and there; "
                "use the 'network' of that run, and images of as many channels and classes"
            )
    return weights
