"""The folder of a diffusers pipeline: `model_index.json`, the network and its code, SCMScheduler's configuration.

Code that diffusers loads lies in `templates/`; it is copied as it is, and needs sctrain to be installed.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.description import DatasetDescription
from sctrain.building import told
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.method import guidance_scale, samplers, student_methods, times_of
from sctrain.files import write_json
from sctrain.snapshots import StoredWeights
from sctrain.tensor_file import write_tensors

TEMPLATES = Path(__file__).with_name("templates")
WRITTEN_FOR = "0.36.0"  # diffusers: its SCMScheduler and its components with code of their own
_PREFIX = "network."  # what the component calls the network inside it
_MOST_STEPS = 8
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def component(config: RunConfig) -> str:
    """What diffusers calls such a network."""
    return "transformer" if config.network.name.startswith("dit") else "unet"


def refuse_unfit(run: Path, config: RunConfig) -> None:
    """UserError unless the run is a consistency model, which is what SCMScheduler steps."""
    if samplers(config) != ("consistency",):
        raise UserError(
            f"{run} was trained by '{config.objective.name}', and diffusers' SCMScheduler draws from consistency "
            "models alone; use --format safetensors"
        )


def write(folder: Path, config: RunConfig, about: DatasetDescription, weights: StoredWeights) -> dict[str, Any]:
    """All but the model card; where the weights are, what their file is, and what their names begin with."""
    name = component(config)
    for part in (name, "scheduler"):
        (folder / part).mkdir()
    shutil.copyfile(TEMPLATES / "pipeline.py", folder / "pipeline.py")
    shutil.copyfile(TEMPLATES / "network.py", folder / name / "network.py")
    write_json(folder / "model_index.json", _index(name, config, about))
    write_json(folder / name / "config.json", _network(config, about))
    scheduler = {"_class_name": "SCMScheduler", "_diffusers_version": WRITTEN_FOR}
    scheduler |= {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": config.sigma_data}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    shapes = {_PREFIX + parameter: shape for parameter, shape in weights.shapes.items()}
    renamed = map(lambda item: (_PREFIX + item[0], item[1]), weights)  # which holds no tensor back
    file, written = f"{name}/{_WEIGHTS}", write_tensors(folder / name / _WEIGHTS, shapes, renamed)
    return {"weights": file, "prefix": _PREFIX, "files": {file: written}}


def _index(name: str, config: RunConfig, about: DatasetDescription) -> dict[str, Any]:
    """With the times of as many steps as `sctrain sample` takes them."""
    methods = student_methods(config, range(1, _MOST_STEPS + 1))
    guided = config.objective.guided_scales is not None
    return {
        "_class_name": ["pipeline", "ConsistencyPipeline"],
        "_diffusers_version": WRITTEN_FOR,
        "scheduler": ["diffusers", "SCMScheduler"],
        **{part: [None, None] for part in ("transformer", "unet")},
        name: ["network", "ConsistencyNetwork"],
        "times": [times_of(config, method) for method in methods],
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "latents": about.latents is not None,
        "guidance_scale": guidance_scale("", config, None) if guided else None,
    }


def _network(config: RunConfig, about: DatasetDescription) -> dict[str, Any]:
    return {
        "_class_name": "ConsistencyNetwork",
        "_diffusers_version": WRITTEN_FOR,
        "options": asdict(config.network),
        "shape": list(about.shape),
        "told": asdict(told(config, about)),
        "sigma_data": config.sigma_data,
        "noise_input": config.noise_input,
        "network_output": config.network_output,
        "anchor": config.objective.anchor,
    }
