"""The runs that a run takes weights from: which snapshots, and whether they are what its method needs.

Descriptions are read, no weights.
"""

from __future__ import annotations

from dataclasses import asdict

from sctrain.config.schema import GuideFrom, RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.runs import RunFolder
from sctrain.snapshots import newest_images, snapshot_config

SOURCES = ("teacher", "guide", "start_from")  # the runs that a run takes weights from


def pinned(config: RunConfig) -> RunConfig:
    """The run with the snapshots that it takes weights from named: those of its first start, else the newest now."""
    folder = RunFolder(config.run_dir)
    saved = folder.saved_config() if folder.config.is_file() else {}
    pins = {}
    for key in SOURCES:
        source: WeightsFrom | None = getattr(config, key)
        if source is not None and source.images is None:
            images = (saved.get(key) or {}).get("images") or newest_images(source.run)
            pins[key] = source.model_copy(update={"images": images})
    carried = config.model_copy(update=pins)
    return carried.model_copy(update={"licence": _licences(carried)})


def _licences(config: RunConfig) -> str:
    """Its own and those of the weights that it starts from or learns from: they hold for what is made of them."""
    sources = [getattr(config, key) for key in SOURCES]
    found = [config.licence, *(described(source).licence for source in sources if source is not None)]
    return "; ".join(dict.fromkeys(part for text in found for part in text.split("; ") if part))


def start_weights(config: RunConfig) -> WeightsFrom | None:
    """Where the initial weights come from: `start_from`, else the teacher of a distillation, else nowhere."""
    return config.start_from or (config.teacher if config.objective.distils else None)


def refuse_unfit_sources(config: RunConfig) -> None:
    """UserError if the runs that weights come from are not what the method needs. Reads descriptions, no weights."""
    if config.teacher is not None:
        _refuse_as_teacher(config, config.teacher)
    if config.guide is not None:
        _refuse_as_guide(config, config.guide)
    start = start_weights(config)
    if start is None:
        return
    _refuse_another_input(config, start)
    _refuse_other_latents(config, start, described(start))
    _refuse_another_network(config, start)
    started = described(start).objective.name
    if config.objective.name == "lcf" and started not in ("lcm", "lcf"):
        raise UserError(f"{start.run} was trained by '{started}'; 'lcf' fine-tunes an LCM: let 'start_from.run' be one")


def described(source: WeightsFrom) -> RunConfig:
    """The description that the named snapshot was published with."""
    assert source.images is not None, "pinned() names the snapshot"
    return snapshot_config(source.run, source.images)


def _refuse_as_guide(config: RunConfig, source: GuideFrom) -> None:
    theirs = described(source)
    if theirs.objective.samples_as != "diffusion":
        raise UserError(f"{source.run} was trained by '{theirs.objective.name}'; a guide is a diffusion model")
    if source.labels == "none" and not answers_without_label(theirs):
        raise UserError(
            f"{source.run} was trained without label dropout, so it knows no images without a label: set "
            "'guide.labels' to same"
        )
    _refuse_other_data(config, source, theirs)


def answers_without_label(config: RunConfig) -> bool:
    """Whether the network was trained without labels: now and then, or throughout."""
    return config.objective.label_dropout > 0 or not getattr(config.network, "told_classes", True)


def _refuse_as_teacher(config: RunConfig, source: WeightsFrom) -> None:
    taught = described(source)
    if taught.objective.samples_as != "diffusion":
        raise UserError(f"{source.run} was trained by '{taught.objective.name}'; a teacher is a diffusion model")
    guides_itself = config.objective.guided_scales is not None and config.guide is None
    if guides_itself and taught.objective.label_dropout == 0.0:
        mend = "train it with objective.label_dropout=0.1"
        if type(config.objective).model_fields["guidance"].default is None:
            mend = f"remove 'objective.guidance', or {mend}"
        mend += ", or name a 'guide'"
        raise UserError(f"{source.run} was trained without label dropout, so it cannot be guided; {mend}")
    _refuse_other_data(config, source, taught)
    _refuse_another_network(config, source)


def _refuse_other_data(config: RunConfig, source: WeightsFrom, taught: RunConfig) -> None:
    """UserError if the same x is another image to a frozen network."""
    if taught.sigma_data != config.sigma_data:
        raise UserError(
            f"{source.run} was trained with sigma_data {taught.sigma_data}, this run has {config.sigma_data}; "
            "set 'sigma_data' to that run's"
        )
    _refuse_other_latents(config, source, taught)
    for key in ("mean", "std"):
        theirs, ours = (list(getattr(run.data, key)) for run in (taught, config))
        if (len(theirs) == len(ours) and theirs != ours) or {*theirs} != {*ours}:  # one value stands for all channels
            raise UserError(
                f"{source.run} was trained with data.{key} {theirs}, this run has {ours}: the same image is another x; "
                f"set 'data.{key}' to that run's"
            )


def _refuse_other_latents(config: RunConfig, source: WeightsFrom, theirs: RunConfig) -> None:
    if theirs.data.latents != config.data.latents:
        raise UserError(
            f"{source.run} was trained on {theirs.data.latents or 'no'} latents, this run has "
            f"data.latents {config.data.latents or 'none'}: use data and weights of one convention"
        )


def _refuse_another_network(config: RunConfig, source: WeightsFrom) -> None:
    """Not all options show in the shapes of weights: heads do not, nor does the embedding of time."""
    theirs, ours = asdict(described(source).network), asdict(config.network)
    for key in ours | theirs:
        if not key.startswith("dropout") and theirs.get(key) != ours.get(key):
            raise UserError(
                f"{source.run} was trained with network.{key} {theirs.get(key)}, this run has {ours.get(key)}; "
                "use the 'network' of that run"
            )


def _refuse_another_input(config: RunConfig, source: WeightsFrom) -> None:
    """UserError if the weights come from a network that is told, or says, something else, and is not to relearn it."""
    start = described(source)
    for key, does in (("noise_input", "is told"), ("network_output", "says the")):
        theirs = getattr(start, key)
        if theirs != getattr(config, key) and not source.relearns:
            raise UserError(
                f"the network of {source.run} {does} {theirs}: set '{key}' to {theirs}, start from another, or let it "
                "learn the change with 'start_from.relearns' true"
            )
