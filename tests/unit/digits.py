"""The prepared digits with their extractor, made once per test session; and runs with tiny networks on them."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from data_pipeline.digits import prepare_digits
from sctrain.building import fresh_network, open_split
from sctrain.config.schema import RunConfig
from sctrain.evaluation.extractor import train_extractor
from sctrain.runs import RunFolder
from sctrain.snapshots import publish

_folder = TemporaryDirectory(prefix="sctrain-digits-")


@cache
def prepared() -> str:
    """URL of the data."""
    url = f"{_folder.name}/digits"
    prepare_digits(url)
    train_extractor(url)
    return url


def tiny_config(run: Path, objective: str, **keys: Any) -> RunConfig:
    """A run that is scored in no time."""
    evaluation = {"samples": 40, "batch": 40, "ode_steps": 2, "steps": [1, 2], "seeds": [0]}
    return RunConfig.model_validate(
        {
            "name": run.name,
            "run_dir": run,
            "data": {"url": prepared(), "mean": [0.3053], "std": [0.3760]},
            "network": {"width": 16, "depth": 1, "heads": 2},
            "objective": {"name": objective} | keys.pop("method", {}),
            "batch": {"global_size": 8},
            "budget_images": 64,
            "evaluation": evaluation | keys.pop("evaluation", {}),
            **keys,
        }
    )


def publish_random(config: RunConfig, *images: int) -> None:
    """Snapshots with random weights, the same for every run."""
    for count in images:
        torch.manual_seed(count)
        network = fresh_network(config, open_split(config).description)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # heads start at zero, which would make all runs alike
        state = network.state_dict()
        shapes = {name: value.shape for name, value in state.items()}
        tracks = {0.05: state.items()}
        publish(RunFolder(config.run_dir).snapshots, count, tracks, config.model_dump(mode="json"), shapes)


def write_status(run: Path, state: str, images: int, seconds: float) -> None:
    status = {"state": state, "images": images, "wall_seconds": seconds, "ranks": 2}
    RunFolder(run).status.write_text(json.dumps(status))
