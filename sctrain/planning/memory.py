"""Bytes on every rank, by item: what is held between steps, and what a micro-batch or the optimizer adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.description import DatasetDescription
from sctrain.bench.memory import Watch
from sctrain.config.deepspeed import deepspeed_config, derive_batch
from sctrain.config.schema import RunConfig
from sctrain.planning.counting import Counted, count, parameter_sizes
from sctrain.planning.zero3 import Zero3Sizes

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Of one rank: `held` between steps, and what two phases that do not meet add to it."""

    held: dict[str, int]
    micro_batch: dict[str, int]  # forward and backward
    optimizer: int  # its step, when activations are gone
    elsewhere: dict[str, int] = field(default_factory=dict)  # in the machine's own memory, or on its disk

    @property
    def peak(self) -> int:
        """Of live tensors; allocators need some more, which differs."""
        return sum(self.held.values()) + max(sum(self.micro_batch.values()), self.optimizer)


@dataclass(frozen=True)
class Layout:
    """How a run lies on its ranks."""

    config: RunConfig
    about: DatasetDescription
    world: int
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def zero(self) -> dict:
        """DeepSpeed's `zero_optimization`, complete."""
        return deepspeed_config(self.config, self.world, gpu=self.device == "cuda")["zero_optimization"]

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    @property
    def micro(self) -> int:
        """Images of a micro-batch on one rank."""
        return derive_batch(self.config, self.world)[0]

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return derive_batch(self.config, self.world)[1]

    @property
    def sizes(self) -> Zero3Sizes | None:
        """None where parameters are not partitioned."""
        return Zero3Sizes.of(self.zero, self.world) if self.stage == 3 else None

    @property
    def bytes_each(self) -> int:
        """Of a weight in the precision of the forward."""
        return 2 if self.config.precision == "bf16" else FP32

    @property
    def has_teacher(self) -> bool:
        """Whether a network of its own teaches."""
        return self.config.objective.distils and not self.config.objective.target_teaches


def memory(layout: Layout, counted: Counted | None = None, *, itemised: bool = True) -> Memory:
    """Counted by running a micro-batch on fake tensors; `counted` is that count, where it is known.

    Itemised, it runs twice more, to tell activations, tangents and gathered parameters apart.
    """
    config, about, micro = layout.config, layout.about, layout.micro
    numels = parameter_sizes(config, about)
    held, elsewhere = _held(layout, numels)
    whole = counted or counted_of(layout)
    split = {"forward and backward": whole.peak}
    if itemised:
        together = count(config, about, micro, None)
        tangent = 0
        if config.objective.has_tangents:
            # Never below 0, where PyTorch's plain functions keep more than those that carry tangents.
            tangent = max(0, together.peak - count(config, about, micro, None, tangents=False).peak)
        split = {
            "activations": together.peak - tangent,
            "tangent workspace": tangent,
            "gather buffers" if layout.stage == 3 else "its gradients": whole.peak - together.peak,
        }
    return Memory(held, split, _optimizer_step(layout, numels), elsewhere)


def counted_of(layout: Layout) -> Counted:
    """One micro-batch of it. Where parameters are whole and no micro-batch follows, gradients come with it."""
    alone = layout.stage == 0 and layout.accumulation == 1
    return count(layout.config, layout.about, layout.micro, layout.sizes, keeps_gradients=alone)


def _held(layout: Layout, numels: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    """On the device, and elsewhere."""
    total, sizes, b = sum(numels), layout.sizes, layout.bytes_each
    share = sum(-(-n // layout.world) for n in numels)  # EMA and target are sharded in every stage
    if sizes is None:
        held = _replicated(layout, total)
    else:
        shards = sum(map(sizes.shard, numels))
        held = {
            "parameters": b * (shards + sum(n for n in numels if sizes.persists(n))),
            "masters": FP32 * shards if b < FP32 else 0,  # float32 weights are their own
            "moments": 2 * FP32 * shards,
            "gradients": b * shards,
            "reduce bucket": b * sizes.bucket,
        }
    compute = b * (total if sizes is None else share)
    held["EMA tracks"] = FP32 * share * len(layout.config.ema.widths)
    if layout.config.objective.has_target:
        held["target"] = FP32 * share + compute
    if layout.has_teacher:
        held["teacher"] = compute
    return _offloaded(layout, held, share)


def _offloaded(layout: Layout, held: dict[str, int], share: int) -> tuple[dict[str, int], dict[str, int]]:
    """What stays on the device, and what is kept on the host or on a disk."""
    offload, elsewhere = layout.config.offload, {}
    moved = {"EMA tracks": offload.ema, "moments": offload.optimizer, "masters": offload.optimizer}
    if "offload_optimizer" in layout.zero:  # DeepSpeed's own, which keeps gradients and masters there in any case
        moved["gradients"] = offload.optimizer
    for name, place in moved.items():
        if place != "device" and held.get(name):
            elsewhere[f"{name} ({'host' if place == 'cpu' else 'disk'})"] = held.pop(name)
    if offload.checkpoint_copy:
        tracks = len(layout.config.ema.widths) + layout.config.objective.has_target
        elsewhere["checkpoint staging (host)"] = FP32 * share * (3 + tracks)
    return held, elsewhere


def _replicated(layout: Layout, total: int) -> dict[str, int]:
    """ZeRO-0: the optimizer steps the float32 weights themselves; bf16 weights have masters beside them."""
    held = {"parameters": layout.bytes_each * total, "moments": 2 * FP32 * total}
    if layout.accumulation > 1:
        held["gradients"] = layout.bytes_each * total
    if layout.bytes_each != FP32:
        held["masters"] = FP32 * total
    return held


def _optimizer_step(layout: Layout, numels: list[int]) -> int:
    """Peak of an optimizer step by PyTorch's own optimizer; in ZeRO-3 of the largest group that is stepped at once."""
    sizes, low = layout.sizes, layout.bytes_each < FP32
    if layout.config.offload.optimizer != "device":
        return 0
    steps = numels if sizes is None else [max(_groups(numels, sizes))]
    make = torch.optim.RAdam if layout.config.optimizer.name == "radam" else torch.optim.Adam
    with FakeTensorMode():
        masters = [torch.nn.Parameter(torch.empty(numel)) for numel in steps]
        optimizer = make(masters, foreach=layout.device == "cuda" and sizes is None)
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()  # which makes the moments
        optimizer.zero_grad()
        given = [torch.empty_like(x, dtype=torch.bfloat16 if low else torch.float32) for x in masters]
        with Watch() as watch:
            for master, gradient in zip(masters, given, strict=True):
                master.grad = gradient.clone().float() if low or sizes is not None else gradient
            optimizer.step()
    alone = sizes is None and layout.accumulation == 1  # then gradients are not among what is held
    return watch.peak + (layout.bytes_each * sum(numels) if alone else 0)


def _groups(numels: list[int], sizes: Zero3Sizes) -> list[int]:
    """Elements of the shards of each of DeepSpeed's sub-groups, which are full once they reach `sub_group_size`."""
    groups = [0]
    for numel in numels:
        if groups[-1] >= sizes.sub_group:
            groups.append(0)
        groups[-1] += sizes.shard(numel)
    return groups
