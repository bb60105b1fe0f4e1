"""`sctrain bench step`: what a consistency step costs beside a plain diffusion step of the same network.

A step is: clear gradients, objective, backward; no optimizer, EMA or loader. Checkpointed steps are compared with
checkpointed diffusion. On one rank the network stands alone; on several it is a ZeRO-3 engine that keeps no parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.dit import DiT
from models.dit_options import DiTOptions
from models.edm2 import EDM2
from models.edm2_options import EDM2Size
from models.execution import Execution
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import tangent_engine
from sctrain.bench.memory import Footprint, footprint
from sctrain.bench.plain import plain_steps
from sctrain.bench.timing import Spread, Step, Timed, interleaved
from sctrain.config.schema import OptimizerConfig
from sctrain.objectives.base import Draws, Networks, Objective
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import Diffusion
from sctrain.zero.engine import FrozenEngine, StudentEngine
from sctrain.zero.world import World

CLASSES, CHANNELS, PATCH = 1000, 4, 2
# As with a network that is too large to keep: every module gathers its parameters whenever it needs them.
_KEEP_NOTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
TEACHER_PASSES = {"sct": 0, "scd": 1, "scd-guided": 2}


@dataclass(frozen=True)
class StepSettings:
    """The network, its batch over all ranks, and what to compare."""

    network: str | None = None  # a published size by name, in place of a DiT of the following shape
    width: int = 384
    depth: int = 8
    heads: int = 6
    side: int = 32  # of the latents, in pixels: (side / 2)^2 tokens
    batch: int = 4
    precision: str = "fp32"
    tangent_precision: str = "value"
    attention: str = "auto"
    rounds: int = 5
    objectives: tuple[str, ...] = ("sct", "scd", "scd-guided")
    engines: tuple[str, ...] = ("single_pass", "two_pass", "finite_difference")
    checkpointing: tuple[str, ...] = ("no", "yes")

    @property
    def tangent_share(self) -> float:
        """Multiply-adds of a tangent over those of a forward: attention has four products for its two."""
        if self.network is not None:
            return 1.0  # attention is a hundredth of it
        linear, attention = 24 * self.width**2, 4 * (self.side // PATCH) ** 2 * self.width
        return (linear + 2 * attention) / (linear + attention)


@dataclass(frozen=True)
class Row:
    """One kind of step: its ratio to the diffusion step that keeps activations likewise."""

    objective: str
    engine: str
    checkpointing: bool
    ranks: int
    ratio_median: float
    ratio_min: float
    ratio_max: float
    limit: float | None  # what the additional multiply-adds alone would cost
    memory_ratio: float | None
    gathers: int | None  # of parameters, per step
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class _Setting:
    """A network with a teacher, and one fixed batch of this rank."""

    network: DiT | EDM2
    student: Callable
    teacher: Callable
    draws: Draws
    backward: Callable[[torch.Tensor], None]
    finish: Callable[[], None]


def measure(settings: StepSettings, world: World | None, device: torch.device) -> list[Row]:
    """All rows for one number of ranks; every rank takes part, and the rows of rank 0 count."""
    rows: list[Row] = []
    for checkpointing in (word == "yes" for word in settings.checkpointing):
        setting = _setting(settings, world, device, checkpointing)
        steps = {
            (name, engine): _step(settings, setting, name, engine)
            for name in settings.objectives
            for engine in settings.engines
        }
        baseline = _step(settings, setting, "diffusion", "none")
        extras = {("forward", "none"): Step(lambda s=setting: _forward(s))}
        if world is None and not checkpointing and settings.precision == "fp32":
            draws = setting.draws
            forward, diffusion = plain_steps(setting.network, draws.x0 / 0.5, draws.t, draws.labels, draws.z)
            extras |= {("plain PyTorch forward", "none"): forward, ("plain PyTorch diffusion", "none"): diffusion}
        barrier = world.barrier if world is not None else lambda: None
        base, timed = interleaved(baseline, extras | steps, settings.rounds, barrier)
        prints = {key: _footprint(step) for key, step in {("diffusion", "none"): baseline, **steps}.items()}
        timed[("diffusion", "none")] = Timed(base, Spread(1.0, 1.0, 1.0))
        share = timed[("forward", "none")].ratio.median
        ranks = 1 if world is None else world.size
        rows += [
            _row(settings, key, checkpointing, ranks, timed[key], prints.get(key), prints[("diffusion", "none")], share)
            for key in (("diffusion", "none"), *extras, *steps)
        ]
    return rows


def _row(
    settings: StepSettings,
    key: tuple[str, str],
    checkpointing: bool,
    ranks: int,
    timed: Timed,
    memory: Footprint | None,
    base: Footprint,
    share: float,
) -> Row:
    name, engine = key
    return Row(
        name,
        engine,
        checkpointing,
        ranks,
        *(round(x, 4) for x in (timed.ratio.median, timed.ratio.lowest, timed.ratio.highest)),
        limit=_limit(name, engine, share, settings.tangent_share),
        memory_ratio=None if memory is None else round(memory.peak_bytes / base.peak_bytes, 4),
        gathers=None if memory is None else memory.gathers,
        seconds=round(timed.seconds.median, 5),
        peak_bytes=None if memory is None else memory.peak_bytes,
    )


def _limit(name: str, engine: str, share: float, tangent_share: float) -> float | None:
    """1 + the forwards that come on top, each `share` of a diffusion step."""
    if name not in TEACHER_PASSES:
        return None
    own = {"single_pass": tangent_share, "two_pass": 1 + tangent_share, "finite_difference": 2}[engine]
    return round(1 + share * (own + TEACHER_PASSES[name]), 4)


def _setting(settings: StepSettings, world: World | None, device: torch.device, checkpointing: bool) -> _Setting:
    size = settings.batch // (1 if world is None else world.size)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    distils = any(TEACHER_PASSES[name] for name in settings.objectives)
    network = _network(settings, checkpointing, seed=0)
    teacher = _network(settings, checkpointing, seed=1) if distils else nn.Identity()
    if world is None:
        network, teacher = network.to(device, dtype), teacher.to(device, dtype).requires_grad_(False)
        student, backward = network, lambda loss: loss.backward()

        def finish() -> None:
            network.zero_grad(set_to_none=True)
    else:
        config = {
            "train_micro_batch_size_per_gpu": size,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": settings.precision == "bf16"},
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False, **_KEEP_NOTHING},
        }
        student = StudentEngine(network, OptimizerConfig(), config)
        teacher = FrozenEngine(teacher, config, device) if distils else teacher
        backward = student.backward

        def finish() -> None:
            student.step(0.0)

    return _Setting(network, student, teacher, _draws(settings, size, device), backward, finish)


def _network(settings: StepSettings, checkpointing: bool, seed: int) -> DiT | EDM2:
    """Nothing is zero at the start, so nothing is free."""
    torch.manual_seed(seed)
    if settings.network is None:
        options = DiTOptions(width=settings.width, depth=settings.depth, heads=settings.heads, patch_size=PATCH)
    else:
        options = EDM2Size(settings.network)  # pyright: ignore[reportArgumentType]
    execution = Execution(settings.attention, checkpointing)  # pyright: ignore[reportArgumentType]
    network = build_network(options, CHANNELS, settings.side, settings.side, Conditioning(CLASSES), execution=execution)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert isinstance(network, DiT | EDM2)
    return network


def _draws(settings: StepSettings, size: int, device: torch.device) -> Draws:
    shape = (size, CHANNELS, settings.side, settings.side)
    x0, z = 0.5 * torch.randn(2, *shape, device=device)
    t = torch.linspace(0.1, 1.5, size, device=device)
    return Draws(x0, z, t, torch.arange(size, device=device) % CLASSES)


def _step(settings: StepSettings, setting: _Setting, name: str, engine: str) -> Step:
    objective, draws = _objective(name), setting.draws
    if name == "scd-guided":
        draws = Draws(draws.x0, draws.z, draws.t, draws.labels, guidance=torch.full_like(draws.t, 1.5))
    wide = torch.float32 if settings.tangent_precision == "fp32" else None
    tangent = tangent_engine("single_pass" if engine == "none" else engine, wide)

    def student(u, t, labels, guidance=None):  # the embedding of a scale costs nothing; the teacher's passes do
        return setting.student(u, t, labels)

    @torch.no_grad()
    def teacher(u, t, labels):
        return setting.teacher(u, t, labels)

    networks = Networks(student, tangent, teacher)
    return Step(lambda: setting.backward(objective.loss(draws, networks).per_sample.mean()), setting.finish)


def _objective(name: str) -> Objective:
    common = {"sigma_data": 0.5, "num_classes": CLASSES, "time_mean": -1.0, "time_std": 1.4, "label_dropout": 0.0}
    if name == "diffusion":
        return Diffusion(**common)
    tangent = {"tangent_normalization": "l2", "tangent_constant": 0.1, "tangent_warmup_images": 0}
    return ContinuousConsistency(**common, **tangent, distill=name != "sct")


@torch.no_grad()
def _forward(setting: _Setting) -> None:
    draws = setting.draws
    setting.student(draws.x0 / 0.5, draws.t, draws.labels)


def _footprint(step: Step) -> Footprint:
    seen = footprint(step.run)
    step.finish()
    return seen
