"""The model card: README.md of an exported model. What is not known is said to be unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from data_pipeline.description import DatasetDescription
from sctrain.config.loading import dump
from sctrain.config.schema import RunConfig
from sctrain.evaluation.publishing import SCALARS
from sctrain.exports import Format
from sctrain.runs import RunFolder

_KINDS = {
    "diffusion": "diffusion model",
    "consistency": "consistency model",
    "jumps": "model that jumps along trajectories",
}


def model_card(
    run: Path, manifest: Mapping[str, Any], config: RunConfig, about: DatasetDescription, kind: Format
) -> str:
    """Markdown, with the head that model hubs read."""
    shape = "x".join(map(str, about.shape))
    what = "latents" if about.latents is not None else "images"
    tags = [config.objective.name, "sctrain"] + ["diffusers"] * (kind == "diffusers")
    parts = [
        "---\nlicense: other\n" + "".join(f"{'tags:' if tag is tags[0] else ''}\n- {tag}" for tag in tags) + "\n---",
        f"# {config.name}",
        f"A {_KINDS[config.objective.samples_as]} of {what} {shape} in {len(about.classes)} classes, trained by "
        f"`{config.objective.name}` on {manifest['images']:,} images. The weights are the power-function EMA of "
        f"relative width {manifest['ema']:g}, float32.",
        "## Use\n\n" + _use(config, kind),
        "## Figures\n\n" + _figures(RunFolder(run).scores(), manifest["images"], manifest["ema"]),
        "## Data\n\n" + _data(about),
        "## Licence\n\n" + _licence(manifest, about),
        "## Code\n\n"
        + f"Trained by sctrain {manifest['trained_by'] or 'of a version that was not recorded'}; "
        + f"exported by sctrain {manifest['exported_by']}.",
        f"## Recipe\n\n```yaml\n{dump(config).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _use(config: RunConfig, kind: Format) -> str:
    steps = config.evaluation.ode_steps if config.objective.samples_as == "diffusion" else config.evaluation.steps[0]
    own = f"    sctrain sample FOLDER --steps {steps} --out grid.png"
    if kind == "safetensors":
        return own
    return (
        f"The network's class and the noise of each image come from the package sctrain, which must be installed; "
        f"`pipeline.py` and `network.py` in this folder are code that diffusers runs.\n\n{own}\n\n"
        "    from diffusers import DiffusionPipeline\n"
        '    pipe = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)\n'
        f"    pipe(class_labels=[0], num_inference_steps={steps}).images[0].save('image.png')"
    )


def _figures(lines: Sequence[Mapping[str, Any]], images: int, ema: float) -> str:
    """Of this snapshot and EMA alone, as the run's evaluation measured them."""
    mine = [line for line in lines if line["images"] == images and line["ema"] == ema]
    if not mine:
        return "These weights have not been scored."
    names = [name for name in SCALARS if any(line.get(name) is not None for line in mine)]
    rows = []
    for sampler, steps in dict.fromkeys((line["sampler"], line["steps"]) for line in mine):
        chosen = [line for line in mine if (line["sampler"], line["steps"]) == (sampler, steps)]
        values = [[line[name] for line in chosen if line.get(name) is not None] for name in names]
        cells = [f"{fmean(value):.4g}" if value else "" for value in values]
        rows.append(f"| {sampler}, {steps} | {len(chosen)} | {' | '.join(cells)} |")
    head = f"| sampler, steps | seeds | {' | '.join(names)} |"
    note = "Measured by the run's own evaluation: `fd` is the Frechet distance of its extractor's features."
    return f"{note}\n\n{head}\n|{'---|' * (len(names) + 2)}\n" + "\n".join(rows)


def _data(about: DatasetDescription) -> str:
    text = f"{about.name}, from {about.source}; licence of the data: {about.licence}."
    if about.latents is not None:
        text += f"\n\nLatents of {about.latents.encoder}; convention: {about.latents.convention}."
    return text


def _licence(manifest: Mapping[str, Any], about: DatasetDescription) -> str:
    inherited = manifest["licence"]
    if inherited:
        return f"Derived from weights under this licence, which holds for these too: {inherited}"
    return f"None is recorded for the weights. Those who publish them choose one that the data allow ({about.licence})."
