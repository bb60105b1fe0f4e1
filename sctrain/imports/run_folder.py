"""Published weights as a run: a snapshot that sampling, teachers and starts read, and a description that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.description import DatasetDescription, read_description
from sctrain.building import blueprint, model_space
from sctrain.config.loading import dump
from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import dump_yaml
from sctrain.errors import UserError
from sctrain.files import write_json, write_text
from sctrain.imports.weights import Published
from sctrain.runs import RunFolder
from sctrain.snapshots import publish

NOMINAL_WIDTH = 0.05  # of an EMA that is no power function's: a name, by which runs ask for it
RETIME = "retime.yaml"
_RETIMED = """\
# Fine-tunes the imported network: it will be told c_noise = t and say the velocity, as sct and scd need it, for with
# ln tan t their tangent diverges at t = pi/2 (sCM section 4.1). SANA-Sprint took about 5,000 steps for it. The learning
# rate is a start, nobody has tuned it. Teach with the outcome: `teacher: {run: %s, ema: %g}`.
"""


def described(published: Published, run: Path, url: str, about: DatasetDescription) -> RunConfig:
    """The run that these weights are the end of. UserError where they do not fit the data at `url`."""
    layout = published.layout
    _refuse_other_data(published, url, about)
    sigma_data = float(published.space.get("sigma_data", 0.5))
    width = published.width or NOMINAL_WIDTH
    data: dict[str, Any] = {"url": url}
    if published.latents is not None:
        data["latents"] = published.latents
    else:
        data |= {"mean": [0.5], "std": [sigma_data / 2]}  # [-1, 1] as it is
    return RunConfig.model_validate(
        {
            "name": run.name,
            "run_dir": run,
            **published.space,
            "licence": published.licence,
            "data": data,
            "network": layout.options,
            "objective": dict(published.objective),
            "batch": {"global_size": 1024},
            "budget_images": published.images or 1,
            "ema": {"widths": [width]},
            "evaluation": {"ema": [width], "ode_steps": 18 if (layout.side or 64) <= 32 else 32},
        }
    )


def _refuse_other_data(published: Published, url: str, about: DatasetDescription) -> None:
    layout, source = published.layout, published.source
    if layout.channels not in (0, about.channels) or layout.side not in (None, about.height):
        theirs = f"{layout.side or '?'}x{layout.side or '?'} with {layout.channels} channels"
        raise UserError(
            f"{source} was trained on images of {theirs}, {url} has {about.height}x{about.width} with "
            f"{about.channels}: give --data that it was trained on"
        )
    if layout.classes and layout.classes != len(about.classes):
        raise UserError(
            f"{source} knows {layout.classes} classes, {url} has {len(about.classes)}: give --data of the same classes"
        )


def write_run(published: Published, run: Path, url: str) -> RunConfig:
    """Write the run folder `run`; UserError where it exists, or weights and data do not fit."""
    folder = RunFolder(run)
    if folder.config.exists() or folder.snapshots.exists():
        raise UserError(f"{run} is a run already: choose another folder for --to")
    about = read_description(url)
    config = described(published, run, url, about)
    model_space(config, about)
    weights = published.weights(blueprint(config, about).skeleton(), about.height)
    run.mkdir(parents=True, exist_ok=True)
    images = config.budget_images
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    publish(folder.snapshots, images, {config.ema.widths[0]: weights.items()}, config.model_dump(mode="json"), shapes)
    write_text(folder.config, dump(config))
    if needs_retiming(config):
        write_text(run / RETIME, retimed(config))
    write_json(folder.status, {"state": "finished", "images": images, "wall_seconds": 0.0})
    return config


def needs_retiming(config: RunConfig) -> bool:
    """Whether it is a teacher that is told something else than t, or says something else than the velocity."""
    another = config.noise_input != "t" or config.network_output != "velocity"
    return another and config.objective.samples_as == "diffusion"


def retimed(config: RunConfig) -> str:
    """A description of the fine-tuning, as YAML."""
    run, width = config.run_dir, config.evaluation.ema[0]
    to = run.with_name(f"{run.name}-t")
    normalised = config.network.name.startswith("edm2")
    kept = config.model_dump(mode="json", include={"sigma_data", "data", "network", "licence"})
    text = dump_yaml(
        {
            "name": to.name,
            "run_dir": str(to),
            **kept,
            "noise_input": "t",
            "objective": {"name": "trigflow", "label_dropout": 0.1 if config.objective.label_dropout else 0.0},
            "start_from": {"run": str(run), "ema": width, "relearns": True},
            "batch": {"global_size": 1024},
            "budget_images": 5_120_000,
            "optimizer": {"learning_rate": 1e-3 if normalised else 1e-4, "ramp_images": 102_400},
            "cadence": {"snapshot": 1_024_000, "checkpoint": 1_024_000},
            "evaluation": {"ema": [0.05], "ode_steps": config.evaluation.ode_steps},
        }
    )
    return _RETIMED % (to, 0.05) + text
