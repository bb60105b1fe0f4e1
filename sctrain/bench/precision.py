"""`sctrain bench precision RUN`: the error of tangents in low precision on a trained network, beside what each costs.

The truth is the float64 tangent of the float32 weights, on real images at the times of consistency training, along the
trajectory: the teacher's velocity where the run has one, a diffusion model's own, else that of image and noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.tangent.dual import Dual
from models.tangent.engines import tangent_engine
from sctrain.bench.timing import Step, interleaved
from sctrain.building import open_split, parameterization
from sctrain.config.objectives import TimeDistribution
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.images import in_memory
from sctrain.objectives.base import Batch, Draws, Progress
from sctrain.objectives.drawing import TrigFlowDraws
from sctrain.parameterization import Parameterization
from sctrain.processes import diffuse, per_sample, velocity
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.snapshots import newest_images

IMAGES, TIMED = 64, 8  # that errors are taken over, and of a timed step
# value precision, tangent precision: as in the keys `precision` and `compute.tangent_precision`
COMBINATIONS = (("fp32", "value"), ("bf16", "value"), ("bf16", "fp32"), ("autocast", "value"), ("autocast", "fp32"))


@dataclass(frozen=True)
class PrecisionRow:
    """Relative errors over all images together, and the median and largest of single images' tangents."""

    value: str
    tangent: str
    value_error: float
    tangent_error: float
    median: float
    largest: float
    cost: float  # seconds of forward and backward, over those of fp32
    layers: dict[str, float]  # tangent errors by block


def measure(run: Path, ema: float, rounds: int, device: torch.device) -> list[PrecisionRow]:
    """All combinations on the newest snapshot of a run."""
    generator = Generator.of(run, newest_images(run), ema, device)
    network, arguments = generator.network, _arguments(generator)
    seen = parameterization(generator.config)
    exact = _traced(copy.deepcopy(network).double(), seen, _to(arguments, torch.float64), "value")
    inputs, steps, rows = _to(arguments, torch.float32), {}, []
    few = _first(inputs, TIMED)
    for value, tangent in COMBINATIONS:
        low = copy.deepcopy(network).bfloat16() if value == "bf16" else network
        steps[value, tangent] = Step(lambda low=low, v=value, t=tangent: _step(low, seen, few, v, t))
    _, timed = interleaved(steps["fp32", "value"], steps, rounds)
    for value, tangent in COMBINATIONS:
        low = copy.deepcopy(network).bfloat16() if value == "bf16" else network
        with _computing(value, device):
            ours = _traced(low, seen, inputs, tangent)
        rows.append(_row(value, tangent, ours, exact, timed[value, tangent].ratio.median))
    return rows


@dataclass(frozen=True)
class _Trace:
    """Value and tangent at the end, tangents after each block."""

    value: Tensor
    tangent: Tensor
    layers: dict[str, Tensor]


def _traced(network: nn.Module, seen: Parameterization, arguments: tuple, tangent: str) -> _Trace:
    layers: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, out: Tensor) -> None:
            assert isinstance(out, Dual)
            layers[name] = out.tangent

        return hook

    handles = [block.register_forward_hook(keep(f"block {i}")) for i, block in enumerate(network.blocks.children())]
    with torch.no_grad():
        (value, _), t_value = tangent_engine("single_pass", _wide(tangent))(seen.of(network), *arguments)
    for handle in handles:
        handle.remove()
    return _Trace(value, t_value, layers)


def _step(network: nn.Module, seen: Parameterization, arguments: tuple, value: str, tangent: str) -> None:
    network.zero_grad(set_to_none=True)
    with _computing(value, arguments[0][0].device):
        (F, _), t_F = tangent_engine("single_pass", _wide(tangent))(seen.of(network), *arguments)
    (F * t_F).mean().backward()


def _computing(value: str, device: torch.device) -> AbstractContextManager:
    """PyTorch's autocast is here to compare with; no run uses it."""
    return torch.autocast(device.type, torch.bfloat16) if value == "autocast" else nullcontext()


def _row(value: str, tangent: str, ours: _Trace, exact: _Trace, cost: float) -> PrecisionRow:
    single = (ours.tangent - exact.tangent).flatten(1).norm(dim=1) / exact.tangent.flatten(1).norm(dim=1)
    layers = {name: _relative(ours.layers[name], exact.layers[name]) for name in exact.layers}
    return PrecisionRow(
        value,
        tangent,
        _relative(ours.value, exact.value),
        _relative(ours.tangent, exact.tangent),
        single.median().item(),
        single.max().item(),
        round(cost, 3),
        layers,
    )


def _relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def _wide(tangent: str) -> torch.dtype | None:
    return torch.float32 if tangent == "fp32" else None


def _to(arguments: tuple, dtype: torch.dtype) -> tuple:
    primals, tangents, *conditions = arguments
    return tuple(x.to(dtype) for x in primals), tuple(x.to(dtype) for x in tangents), *conditions


def _first(arguments: tuple, images: int) -> tuple:
    primals, tangents, *conditions = arguments
    cut = (tuple(x[:images] for x in xs) for xs in (primals, tangents))
    return *cut, *(x[:images] for x in conditions)


def _arguments(generator: Generator) -> tuple:
    """((u, t), (t_u, t_t), conditions) in float64, as sCT and sCD evaluate their student."""
    config, about, device = generator.config, generator.about, generator.device
    images, labels = in_memory(open_split(config), IMAGES)
    batch = Batch(generator.space.from_pixels(images), labels)
    times = TimeDistribution()
    drawing = TrigFlowDraws(config.sigma_data, len(about.classes), times.mean, times.std, 0.0)
    draws = drawing.draw(SampleGenerator(0, range(len(images)), Purpose.TRAINING), batch, Progress(0, 1))
    x0, z, t = (x.to(device, torch.float64) for x in (draws.x0, draws.z, draws.t))
    labels = draws.labels.to(device)
    u, cos_sin = diffuse(x0, z, t) / config.sigma_data, t.cos() * t.sin()
    direction = _velocity(generator, u, Draws(x0, z, t, labels)) / config.sigma_data
    conditions = (labels, torch.ones_like(t)) if config.objective.guided_scales is not None else (labels,)
    return (u, t), (per_sample(cos_sin, u) * direction, cos_sin), *conditions


@torch.no_grad()
def _velocity(generator: Generator, u: Tensor, draws: Draws) -> Tensor:
    config = generator.config
    if config.objective.samples_as == "diffusion":
        source = generator
    elif config.teacher is not None and config.teacher.images is not None:
        source = Generator.of(config.teacher.run, config.teacher.images, config.teacher.ema, generator.device)
    else:
        return velocity(draws.x0, draws.z, draws.t)
    network = parameterization(source.config).of(copy.deepcopy(source.network).double())
    F, _ = network(u, draws.t, draws.labels)
    return config.sigma_data * F
