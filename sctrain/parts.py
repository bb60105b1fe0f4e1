"""The parts that a run is made of on its ranks: data, model space, objective, engines, and how a batch reaches them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from data_pipeline.allocator import keep_freed_memory
from data_pipeline.loader import Batch as RawBatch
from data_pipeline.loader import BatchStream, ReadOptions, ShardedDataset, stream
from models.attention import chosen_backend
from models.score import Score
from sctrain import building
from sctrain.beside import Beside, trained_beside
from sctrain.blueprint import Blueprint, Values
from sctrain.config.deepspeed import deepspeed_config, derive_batch
from sctrain.config.schema import RunConfig
from sctrain.objectives import build_objective
from sctrain.objectives.base import Adversary, Batch, Draws, Guide, Loss, Networks, Progress
from sctrain.objectives.drawing import Data
from sctrain.objectives.flow import AlongTrajectory
from sctrain.parameterization import Network
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.runs import RunFolder
from sctrain.self_check import Arguments, Verdict, verify
from sctrain.sources import refuse_unfit_sources
from sctrain.zero.construction import lay_out, partitioned
from sctrain.zero.ema import ShardedPowerEma
from sctrain.zero.engine import ExactNetwork, FrozenEngine, StudentEngine
from sctrain.zero.memory import Memories
from sctrain.zero.target import TargetNetwork
from sctrain.zero.weight_norm import ForcedWeightNorm
from sctrain.zero.world import World


class Parts:
    """Built from the description alone, on all ranks together; weights are those that the run starts with."""

    def __init__(self, config: RunConfig, world: World, dataset: ShardedDataset | None = None):
        """`dataset` takes the place of the configured one; what only measures needs its description alone."""
        self.config, self.world = config, world
        refuse_unfit_sources(config)
        self.dataset = dataset or building.open_split(config)
        data = self.dataset.description
        self.space = building.model_space(config, data)
        known = Data(config.sigma_data, len(data.classes))
        self.objective = build_objective(config.objective, known, data.shape, self.space)
        self._as_F = building.parameterization(config).of
        self.memories = Memories(config.offload, RunFolder(config.run_dir).offload)
        self.student, self.target, networks = self._engines()
        self.beside = trained_beside(config, data, world, self._trained)
        if world.device.type == "cpu" and config.offload.optimizer != "disk":  # there memory is what lacks
            keep_freed_memory()  # now: the blocks that construction leaves are not those that training asks for
        self.networks = replace(networks, **self._as_evaluated(self.beside))

    def _engines(self) -> tuple[StudentEngine, TargetNetwork | None, Networks]:
        """The student, its target network and, for a distillation, its teacher: engines of their own."""
        config, data = self.config, self.dataset.description
        zero = self._zero
        self._blueprint = building.blueprint(config, data)
        student, self.weight_norm = self._trained(self._blueprint, building.first_values(config, self._blueprint))
        target = None
        if config.objective.has_target:
            target = TargetNetwork(
                student.shards,
                self._laid_out(self._blueprint, partitioned(zero)),
                zero,
                self.world.device,
                shares_masks=not config.objective.target_teaches,
            )
        frozen = self._teacher(zero), target and self._as_F(target)
        return (
            student,
            target,
            Networks(
                self._as_F(student),
                building.tangent_of(config),
                *frozen,
                mean=self.world.mean,
                guide=self._guide(zero),
            ),
        )

    @property
    def _zero(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        return deepspeed_config(self.config, self.world.size, gpu=self.world.device.type == "cuda")

    def _trained(self, blueprint: Blueprint, first: Values) -> tuple[StudentEngine, ForcedWeightNorm]:
        """A network with the run's optimizer and these weights, normalised where the network has it so."""
        network = self._laid_out(blueprint, self._zero, trained=True)
        engine = StudentEngine(network, self.config.optimizer, self._zero, self.memories.optimizer)
        engine.shards.fill(first)
        weight_norm = ForcedWeightNorm(engine.shards, network)
        weight_norm.apply()
        return engine, weight_norm

    def _teacher(self, zero: dict[str, Any]) -> Network | None:
        """The frozen teacher of a distillation; none where the target network, which starts as the teacher, teaches."""
        config = self.config
        if config.teacher is None or config.objective.target_teaches:
            return None
        engine = self._frozen(*building.teacher_network(config, self.dataset.description), zero)
        return building.source_parameterization(config.teacher).of(engine)

    def _guide(self, zero: dict[str, Any]) -> Guide | None:
        """What guides the teacher in place of itself."""
        config, data = self.config, self.dataset.description
        if config.guide is None:
            return None
        engine = self._frozen(*building.guide_network(config, data), zero)
        return Guide(building.source_parameterization(config.guide).of(engine), building.guide_label(config, data))

    def _frozen(self, blueprint: Blueprint, weights: Values, zero: dict[str, Any]) -> FrozenEngine:
        engine = FrozenEngine(self._laid_out(blueprint, zero), zero, self.world.device)
        engine.fill(weights)
        return engine

    def _as_evaluated(self, beside: Beside | None) -> dict[str, Any]:
        """What an objective may evaluate of what is trained beside the student."""
        if beside is None:
            return {}
        if isinstance(beside.engine.module, Score):
            return {"score": self._as_F(beside.engine)}
        return {"adversary": Adversary(beside.engine.module, beside.engine)}

    def power_ema(self) -> ShardedPowerEma:
        """EMA tracks of the run's widths that follow the student from now on."""
        return ShardedPowerEma(self.student.shards, self.config.ema.widths, self.memories.ema)

    def _laid_out(self, blueprint: Blueprint, zero: dict[str, Any], *, trained: bool = False) -> nn.Module:
        return lay_out(blueprint, zero, self.world.device, trained=trained)

    def train_beside(self, loss: Loss, rate: float) -> None:
        """To be called with every micro-batch, and the student's learning rate."""
        if self.beside is not None and loss.beside is not None:
            self.beside.train(loss.beside, rate)

    def update_target(self, before: Progress, after: Progress, *, applied: bool) -> None:
        """Let the target network follow an optimizer step.

        After one that was dropped there is nothing to average, but where the target becomes the student it must: that
        step's images count, and the next stage begins (progressive distillation).
        """
        if self.target is not None:
            keep = self.objective.target_keep(before, after)
            assert keep is not None, "the objective and its description agree on a target"
            if applied or keep == 0:
                self.target.update(keep)

    def batches(self, position: int) -> BatchStream:
        """This rank's micro-batches from a position of the endless sequence on."""
        config, (micro, _) = self.config, derive_batch(self.config, self.world.size)
        return stream(
            self.dataset,
            seed=config.seed,
            start=position,
            global_batch=config.batch.global_size,
            micro_batch=micro,
            rank=self.world.rank,
            world=self.world.size,
            workers=config.data.workers,
            prefetch=config.data.prefetch_batches,
            window=config.data.shuffle_window,
            nodes=self.world.nodes,
            options=ReadOptions(config.data.flip, config.data.max_corrupt_share, config.data.on_lost_shard),
        )

    def draw(self, raw: RawBatch, progress: Progress) -> Draws:
        """A micro-batch in model space, with everything random that its objective needs."""
        device, seed = self.world.device, self.config.seed
        images = self.space.from_pixels(raw.images.to(device, non_blocking=True))
        # Dropout masks: reproducible for a given number of ranks, independent between ranks and steps.
        torch.manual_seed(hash((seed, int(raw.positions[0]))) % 2**63)
        generator = SampleGenerator(seed, raw.positions, Purpose.TRAINING, device)
        return self.objective.draw(generator, Batch(images, raw.labels.to(device, non_blocking=True)), progress)

    def has_tangents(self) -> bool:
        """Whether the objective differentiates the student along a direction."""
        return self.config.objective.has_tangents

    def tangent_method(self) -> str:
        """How tangents are computed here, for the log."""
        if self.config.objective.records_tangents:
            return "tangents by PyTorch's forward mode in float32, with their graph"
        compute, wide = self.config.compute, self.config.precision == "fp32"
        dtype = torch.float32 if wide or compute.tangent_precision == "fp32" else torch.bfloat16
        head_dim = self.student.module.head_dim
        assert isinstance(head_dim, int)
        backend = chosen_backend(self.world.device, dtype, head_dim, compute.attention)
        return f"tangents by {compute.tangent_engine} in {str(dtype).removeprefix('torch.')}, attention by {backend}"

    def verify_tangents(self, draws: Draws) -> Verdict:
        """The engine's tangent against differences, on a few samples of this batch. All ranks take part."""
        assert isinstance(self.objective, AlongTrajectory), "the objective and its description agree on tangents"
        point = self.objective.trajectory(draws, self.networks)
        arguments = Arguments(point.primals, point.direction, point.conditions)
        with self._in_float32() as exact:
            running = self.networks.student
            wide = running if exact.network is self.student else self._as_F(exact.network)
            return verify(self.networks.tangent, running, wide, exact.module, arguments, self.world)

    def _in_float32(self) -> AbstractContextManager[ExactNetwork]:
        return self.student.in_float32(lambda zero: self._laid_out(self._blueprint, zero), self.world.device)
