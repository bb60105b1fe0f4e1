"""One micro-batch of the run's own objective on its own networks, as fake tensors: what it holds, computes and gathers.

Nothing is estimated here: autograd keeps what it keeps, under the configured tangent engine, checkpointing and
precision, and every storage is counted from its first to its last use. Only the device is another: kernels that exist
on a GPU alone are counted as the CPU's implementation of the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from data_pipeline.description import DatasetDescription
from sctrain import building
from sctrain.bench.memory import Watch
from sctrain.blueprint import Blueprint
from sctrain.config.objectives import TrigFlowObjective
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.objectives import build_objective
from sctrain.objectives.base import Adversary, Batch, Draws, Guide, Networks, Objective, Progress
from sctrain.objectives.drawing import Data
from sctrain.planning.cast import DISCRIMINATOR, GUIDE, SCORE, STUDENT, TARGET, TEACHER, TRAINED, cast
from sctrain.planning.flops import Flops
from sctrain.planning.zero3 import Zero3Gathering, Zero3Sizes
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.smoke.shrinking import without_backbone


@dataclass(frozen=True)
class Counted:
    """Of one micro-batch on one rank, in bytes beyond what is held between steps."""

    peak: int
    flops: int  # 2 per multiply-add
    gathered: int  # elements of all networks


def count(
    config: RunConfig,
    about: DatasetDescription,
    micro: int,
    sizes: Zero3Sizes | None,
    *,
    tangents: bool = True,
    keeps_gradients: bool = False,
) -> Counted:
    """`micro` images on a rank. `sizes` None: parameters are not partitioned. Without tangents theirs are zeros.

    Gradients of parameters count up to the end where `keeps_gradients`, else until they are complete.

    UserError where the objective looks at values, which fake tensors have none of.
    """
    draws, objective = _drawn(config, about, micro)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        networks, modules, trained = _networks(config, about, mode, tangents)
        draws = _faked(draws, mode)
        gatherings = [] if sizes is None else [Zero3Gathering(module, sizes) for module in modules]
        if sizes is None and not keeps_gradients:
            for parameter in chain.from_iterable(module.parameters() for module in trained):
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        try:
            if gatherings:  # the first step is traced, the second is like all others
                _step(objective, draws, networks, gatherings)
                for module in trained:
                    module.zero_grad()
            with Flops() as flops, Watch() as watch:
                gathered = _step(objective, draws, networks, gatherings)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"the objective '{config.objective.name}' looks at values ({error}), which a plan has none of: "
                "plan with another objective on the same network"
            ) from error
    return Counted(watch.peak, flops.total, gathered)


def _step(objective: Objective, draws: Draws, networks: Networks, gatherings: list[Zero3Gathering]) -> int:
    loss = objective.loss(draws, networks)
    loss.per_sample.mean().backward()
    if loss.beside is not None:
        loss.beside.mean().backward()
    gathered = sum(gathering.gathered for gathering in gatherings)
    for gathering in gatherings:
        gathering.end_of_step()
    return gathered


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _drawn(config: RunConfig, about: DatasetDescription, micro: int) -> tuple[Draws, Objective]:
    """Real draws of a random batch, halfway through the run."""
    method = without_backbone(config.objective)
    classes = len(about.classes)
    objective = build_objective(
        method, Data(config.sigma_data, classes), about.shape, building.model_space(config, about)
    )
    generator = SampleGenerator(config.seed, range(micro), Purpose.TRAINING)
    images = config.sigma_data * torch.randn(micro, *about.shape)
    batch = Batch(images, torch.arange(micro) % classes)
    return objective.draw(generator, batch, Progress(config.budget_images // 2, config.budget_images)), objective


def _networks(
    config: RunConfig, about: DatasetDescription, mode: FakeTensorMode, tangents: bool
) -> tuple[Networks, list[nn.Module], list[nn.Module]]:
    """As `Parts` builds them; all modules, and those that are trained."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    faked = {part: _fake_network(blueprint, mode, dtype) for part, blueprint in cast(config, about).items()}
    trained = [module for part, module in faked.items() if part in TRAINED]
    for part in faked.keys() - TRAINED:
        faked[part].requires_grad_(False).train(part == TARGET and not config.objective.target_teaches)
    as_F = building.parameterization(config).of
    teaches = config.model_copy(update={"objective": TrigFlowObjective()})
    frozen = {part: building.parameterization(teaches).of(faked[part]) for part in (TEACHER, GUIDE) if part in faked}
    judge = faked.get(DISCRIMINATOR)
    networks = Networks(
        as_F(faked[STUDENT]),
        building.tangent_of(config) if tangents else _values_alone,
        frozen.get(TEACHER),
        as_F(faked[TARGET]) if TARGET in faked else None,
        adversary=judge and Adversary(judge, judge),
        guide=Guide(frozen[GUIDE], None) if GUIDE in frozen else None,
        score=as_F(faked[SCORE]) if SCORE in faked else None,
    )
    return networks, list(faked.values()), trained


def _fake_network(blueprint: Blueprint, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    network = blueprint.skeleton()
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                fake = mode.from_tensor(buffer)
                module._buffers[name] = fake.to(dtype) if buffer.is_floating_point() else fake
    return network


def _values_alone(network: Any, primals: Any, tangents: Any, *constants: Any) -> Any:
    outputs = tuple(network(*primals, *constants))
    return outputs, torch.zeros_like(outputs[0])


def _faked(draws: Draws, mode: FakeTensorMode) -> Draws:
    """The same shapes without memory."""
    values = {each.name: getattr(draws, each.name) for each in fields(draws)}
    faked = {name: mode.from_tensor(x) for name, x in values.items() if isinstance(x, Tensor)}
    return replace(draws, **faked)
