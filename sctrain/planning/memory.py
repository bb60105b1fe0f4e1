"""Bytes on every rank, by item: what is held between steps, and what a micro-batch or the optimizer adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.description import DatasetDescription
from sctrain.bench.memory import Watch
from sctrain.config.deepspeed import deepspeed_config, derive_batch
from sctrain.config.schema import RunConfig
from sctrain.planning.cast import DISCRIMINATOR, GUIDE, SCORE, STUDENT, TARGET, TEACHER, TRAINED, cast, sizes
from sctrain.planning.counting import Counted, count
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

    @cached_property
    def numels(self) -> dict[str, list[int]]:
        """Elements of each parameter of all networks, by the part that these have."""
        return {part: sizes(blueprint) for part, blueprint in cast(self.config, self.about).items()}

    @property
    def parameters(self) -> int:
        """Of the student."""
        return sum(self.numels[STUDENT])

    @property
    def trained_parameters(self) -> int:
        """Of all networks whose gradients are averaged."""
        return sum(sum(numels) for part, numels in self.numels.items() if part in TRAINED)


def memory(layout: Layout, counted: Counted | None = None, *, itemised: bool = True) -> Memory:
    """Counted by running a micro-batch on fake tensors; `counted` is that count, where it is known.

    Itemised, it runs twice more, to tell activations, tangents and gathered parameters apart.
    """
    config, about, micro = layout.config, layout.about, layout.micro
    held, elsewhere = _held(layout)
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
    return Memory(held, split, _optimizer_step(layout, layout.numels[STUDENT]), elsewhere)


def counted_of(layout: Layout) -> Counted:
    """One micro-batch of it. Where parameters are whole and no micro-batch follows, gradients come with it."""
    alone = layout.stage == 0 and layout.accumulation == 1
    return count(layout.config, layout.about, layout.micro, layout.sizes, keeps_gradients=alone)


def _held(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """On the device, and elsewhere."""
    numels, b = layout.numels, layout.bytes_each
    # EMA and target are sharded in every stage.
    share = {part: sum(-(-n // layout.world) for n in sizes) for part, sizes in numels.items()}
    compute = {part: b * (sum(numels[part]) if layout.sizes is None else share[part]) for part in numels}
    held = _trained(layout, numels[STUDENT])
    held["EMA tracks"] = FP32 * share[STUDENT] * len(layout.config.ema.widths)
    if TARGET in numels:
        held[TARGET] = FP32 * share[TARGET] + compute[TARGET]
    held |= {part: compute[part] for part in (TEACHER, GUIDE) if part in numels}
    if SCORE in numels:
        held |= {f"{SCORE}'s {name}": size for name, size in _trained(layout, numels[SCORE]).items()}
    if DISCRIMINATOR in numels:  # whole on every rank in every stage
        held[DISCRIMINATOR] = sum(_replicated(layout, sum(numels[DISCRIMINATOR])).values())
    return _offloaded(layout, held, share)


def _trained(layout: Layout, numels: list[int]) -> dict[str, int]:
    """Of a network with an optimizer."""
    sizes, b = layout.sizes, layout.bytes_each
    if sizes is None:
        return _replicated(layout, sum(numels))
    shards = sum(map(sizes.shard, numels))
    return {
        "parameters": b * (shards + sum(n for n in numels if sizes.persists(n))),
        "masters": FP32 * shards if b < FP32 else 0,  # float32 weights are their own
        "moments": 2 * FP32 * shards,
        "gradients": b * shards,
        "reduce bucket": b * sizes.bucket,
    }


def _offloaded(layout: Layout, held: dict[str, int], share: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What stays on the device, and what is kept on the host or on a disk."""
    offload, elsewhere = layout.config.offload, {}
    moved = {"EMA tracks": offload.ema, "moments": offload.optimizer, "masters": offload.optimizer}
    if "offload_optimizer" in layout.zero:  # DeepSpeed's own, which keeps gradients and masters there in any case
        moved["gradients"] = offload.optimizer
    for name in list(held):
        place = moved.get(name.removeprefix(f"{SCORE}'s "), "device")
        if place != "device" and held[name]:
            elsewhere[f"{name} ({'host' if place == 'cpu' else 'disk'})"] = held.pop(name)
    if offload.checkpoint_copy:
        tracks = len(layout.config.ema.widths) + layout.config.objective.has_target
        beside = share.get(SCORE, 0)
        elsewhere["checkpoint staging (host)"] = FP32 * (share[STUDENT] * (3 + tracks) + 3 * beside)
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
