"""A recipe, small enough for seconds on a CPU: the same method, schedules and optimizer on a tiny network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from models.dit_options import DiTOptions
from models.edm2_options import EDM2Options
from models.registry import FreeOptions, NetworkOptions, free_form
from models.unet_options import ADMOptions, UNetOptions
from sctrain.config.objectives import Method
from sctrain.config.schema import BatchConfig, CadenceConfig, DataConfig, OptimizerConfig, RunConfig, WeightsFrom

BATCH = 8
STEPS = 10  # RAdam adapts from its sixth step on
BUDGET = BATCH * STEPS


def shrunk(config: RunConfig, data: str, runs: Path, sources: dict[str, WeightsFrom]) -> RunConfig:
    """The recipe on the images at `data`, in a folder below `runs`; `sources` replace its teacher and its start.

    Everything that counts images shrinks in proportion to the budget. What is left out: compilation, and LPIPS where
    the file with its backbone is not here.
    """
    changes: dict[str, Any] = {
        "run_dir": runs / str(config.run_dir).lstrip("/"),
        "data": DataConfig(url=data, split="train"),
        "network": shrunk_network(config.network),
        "objective": _shrunk_method(config.objective, config.budget_images),
        **sources,
        "batch": BatchConfig(global_size=BATCH),
        "budget_images": BUDGET,
        "optimizer": _shrunk_optimizer(config.optimizer, config.budget_images),
        "compute": config.compute.model_copy(update={"compile": False}),
        # Differences on shaken weights are rough; a wrong tangent is off by the order of 1.
        "guard": config.guard.model_copy(update={"tangent_error": max(0.1, config.guard.tangent_error)}),
        "cadence": CadenceConfig(status=BUDGET, snapshot=BUDGET // 2, checkpoint=BUDGET),
        "evaluation": config.evaluation.model_copy(
            update={"ema": config.ema.widths[:1], "ode_steps": 2, "ode_teacher": None}
        ),
    }
    return config.model_copy(update=changes)


def shrunk_network(options: NetworkOptions) -> FreeOptions:
    """A small member of the same family, with the same dropout and embedding of time."""
    match free_form(options):
        case DiTOptions() as dit:
            return replace(dit, width=32, depth=2, heads=2, patch_size=min(dit.patch_size, 2))
        case EDM2Options() as edm2:
            return replace(edm2, channels=16, multipliers=(1, 2), blocks=1, attention=(8, 4), head_channels=16)
        case UNetOptions() as unet:
            return replace(unet, channels=16, multipliers=(1, 2), blocks=1, attention=(8,))
        case ADMOptions() as adm:
            return replace(adm, channels=16, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16)


def in_proportion(images: int, budget: int) -> int:
    """A count of images of a run of `budget`, for the shrunk one; at least 1 unless it is 0."""
    return min(images, max(1, round(images * BUDGET / budget)))


def _shrunk_method(method: Any, budget: int) -> Any:
    changes: dict[str, Any] = {}
    if warmup := getattr(method, "tangent_warmup_images", 0):
        changes["tangent_warmup_images"] = in_proportion(warmup, budget)
    return without_backbone(method).model_copy(update=changes)


def without_backbone(method: Any) -> Any:
    """With l2 in place of LPIPS where its backbone is not here."""
    if not lacks_backbone(method):
        return method
    return method.model_copy(update={"metric": method.metric.model_copy(update={"name": "l2", "weights": None})})


def lacks_backbone(method: Method) -> bool:
    """Whether it asks for LPIPS, whose backbone is a file of the user's, and the file is not here."""
    metric = getattr(method, "metric", None)
    return metric is not None and metric.name == "lpips" and not Path(metric.weights or "").is_file()


def _shrunk_optimizer(optimizer: OptimizerConfig, budget: int) -> OptimizerConfig:
    counts = ("ramp_images", "reference_images", "cooldown_images")
    return optimizer.model_copy(
        update={name: in_proportion(getattr(optimizer, name), budget) for name in counts if getattr(optimizer, name)}
    )
