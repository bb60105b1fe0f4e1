"""zero_trajectory.py FOLDER: CTM under ZeRO against an unsharded run.

Every parameter is partitioned. Ranks take halves of every micro-batch; the unsharded run takes it whole, for the
balance of the two terms is common to all ranks. Reports relative errors by case.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import rank
import torch
from deepspeed.utils import safe_get_full_grad
from zero_tangents import BATCH, EPS, RATE, Case, drawn, relative, shaken, zero_config

from models.discriminator import Discriminator
from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import single_pass
from sctrain.config.objectives import TrajectoryObjective
from sctrain.config.schema import OptimizerConfig
from sctrain.objectives import build_objective
from sctrain.objectives.base import Adversary, Networks
from sctrain.objectives.drawing import Data
from sctrain.zero.checkpoint import Checkpointer
from sctrain.zero.engine import FrozenEngine, StudentEngine
from sctrain.zero.state import load_state, save_state
from sctrain.zero.target import TargetNetwork

STEPS, KEEP, SHAPE = 3, 0.5, (1, 8, 8)
OBJECTIVE = build_objective(TrajectoryObjective(name="ctm", levels=4, target_decay=KEEP), Data(0.5, 10), SHAPE)
CASES = [
    Case("ctm", stage=stage, accumulation=accumulation, checkpointing=checkpointing)
    for stage, accumulation, checkpointing in ((0, 1, False), (0, 2, True), (3, 1, False), (3, 2, False), (3, 2, True))
]

draws = partial(drawn, OBJECTIVE)


def network(seed: int, case: Case, jumps: bool = True):
    """No gate is zero."""
    torch.manual_seed(seed)
    options = DiTOptions(width=32, depth=2, heads=2, patch_size=2)
    execution = Execution(checkpointing=case.checkpointing)
    made = build_network(options, *SHAPE, Conditioning(10, jumps=jumps), execution=execution)
    return shaken(made)


def compare(world, case: Case) -> dict[str, float]:
    """Worst relative errors over the steps, of losses, gradients and, at last, the target."""
    reference, follower = network(1, case), network(1, case).requires_grad_(False)
    config = zero_config(world, case)
    student = StudentEngine(network(1, case), OptimizerConfig(eps=EPS), config)
    target = TargetNetwork(student.shards, network(3, case), config, world.device)
    teacher = FrozenEngine(network(2, case, jumps=False), config, world.device)
    networks = Networks(student, single_pass, teacher, target, mean=world.mean)
    plain = Networks(reference, single_pass, network(2, case, jumps=False).requires_grad_(False), follower)
    adam = torch.optim.Adam(reference.parameters(), lr=RATE, betas=(0.9, 0.99), eps=EPS)
    worst = {"loss": 0.0, "balance": 0.0, "gradient": 0.0}
    size, share = BATCH // case.accumulation, BATCH // case.accumulation // world.size
    for step in range(STEPS):
        adam.zero_grad()
        for micro in range(case.accumulation):
            expected = OBJECTIVE.loss(draws(step, micro * size, (micro + 1) * size), plain)
            (expected.per_sample.mean() / case.accumulation).backward()
            mine = micro * size + world.rank * share
            loss = OBJECTIVE.loss(draws(step, mine, mine + share), networks)
            student.backward(loss.per_sample.mean())
            if micro < case.accumulation - 1:
                assert student.step(RATE) is None
            cut = slice(world.rank * share, (world.rank + 1) * share)
            errors = {
                "loss": relative(loss.per_sample, expected.per_sample[cut]),
                "balance": relative(loss.diagnostics["balance"], expected.diagnostics["balance"][cut]),
            }
            worst |= {key: max(worst[key], error) for key, error in errors.items()}
        gradients = [
            (safe_get_full_grad(ours).float().flatten(), theirs.grad.flatten())
            for ours, theirs in zip(student.module.parameters(), reference.parameters(), strict=True)
            if theirs.grad is not None and theirs.grad.norm() > 1e-7
        ]
        assert len(gradients) > 20, "nothing to compare"
        worst["gradient"] = max(worst["gradient"], *(relative(*pair) for pair in gradients))
        assert student.step(RATE).applied
        adam.step()
        target.update(KEEP)
        with torch.no_grad():
            for theirs, ours in zip(follower.parameters(), reference.parameters(), strict=True):
                theirs.lerp_(ours, 1 - KEEP)
    return worst | {"through_target": through(world, target, follower)}


def through(world, target: TargetNetwork, follower) -> float:
    """Relative error of the gradient of the target's output with respect to its input."""
    part = draws(9, world.rank * 4, world.rank * 4 + 4)
    gradients = []
    for network in (target, follower):
        u = (part.x0 / 0.5).requires_grad_()
        F, _ = network(u, part.t, part.labels, None, part.s)
        gradients += torch.autograd.grad(F.square().sum(), u)
    assert gradients[1].norm() > 1e-2
    return relative(*gradients)


class Duel:
    """CTM with a discriminator from the second step on; in stage 3, the discriminator in stage 0 as always."""

    def __init__(self, world, seed: int):
        case, self.world = Case("ctm"), world
        config = zero_config(world, case)
        self.student = StudentEngine(network(seed, case), OptimizerConfig(eps=EPS), config)
        self.target = TargetNetwork(self.student.shards, network(3, case), config, world.device)
        teacher = FrozenEngine(network(2, case, jumps=False), config, world.device)
        torch.manual_seed(seed)
        whole = config | {"zero_optimization": {"stage": 0}}
        self.adversary = StudentEngine(Discriminator(8, *SHAPE, 10), OptimizerConfig(eps=EPS), whole)
        judges = Adversary(self.adversary.module, self.adversary)
        self.networks = Networks(self.student, single_pass, teacher, self.target, world.mean, judges)

    def steps(self, steps: range) -> list[float]:
        """Means of both losses over all ranks, by step."""
        share, told = BATCH // self.world.size, []
        for step in steps:
            mine = replace(draws(step, self.world.rank * share, (self.world.rank + 1) * share), judged=step > 0)
            loss = OBJECTIVE.loss(mine, self.networks)
            self.student.backward(loss.per_sample.mean())
            assert self.student.step(RATE).applied
            told.append(self.world.mean(loss.per_sample.detach().mean()).item())
            if loss.beside is not None:
                self.adversary.backward(loss.beside.mean())
                assert self.adversary.step(RATE).applied
                told.append(self.world.mean(loss.beside.detach().mean()).item())
            self.target.update(KEEP)
        return told

    def save(self, checkpointer: Checkpointer, images: int) -> None:
        save_state(checkpointer, images, self.student.shards, [self.target], {}, self.adversary.shards)
        checkpointer.wait()
        self.world.barrier()

    def load(self, path: Path) -> None:
        load_state(path, self.student.shards, [self.target], self.adversary.shards)


def unsharded_duel() -> list[float]:
    """The same steps by one process on whole batches."""
    case = Case("ctm")
    student, follower = network(1, case), network(1, case).requires_grad_(False)
    torch.manual_seed(1)
    judge = Discriminator(8, *SHAPE, 10)
    teacher = network(2, case, jumps=False).requires_grad_(False)
    networks = Networks(student, single_pass, teacher, follower, adversary=Adversary(judge, judge))
    adams = [torch.optim.Adam(x.parameters(), lr=RATE, betas=(0.9, 0.99), eps=EPS) for x in (student, judge)]
    told = []
    for step in range(4):
        loss = OBJECTIVE.loss(replace(draws(step, 0, BATCH), judged=step > 0), networks)
        for adam, values in zip(adams, (loss.per_sample, loss.beside), strict=True):
            if values is not None:
                adam.zero_grad()
                values.mean().backward()
                told.append(values.mean().item())
                adam.step()
        with torch.no_grad():
            for theirs, ours in zip(follower.parameters(), student.parameters(), strict=True):
                theirs.lerp_(ours, 1 - KEEP)
    return told


def duel(world, folder: Path) -> dict:
    """Against one process; and saved before and after the discriminator began, restored into other engines."""
    first, checkpointer = Duel(world, 1), Checkpointer(folder, 9, world.rank, world.size)
    world.barrier()
    told = first.steps(range(1))
    first.save(checkpointer, BATCH)
    told += first.steps(range(1, 3))
    first.save(checkpointer, 3 * BATCH)
    told += first.steps(range(3, 4))
    other = Duel(world, 5)
    other.load(folder / f"{3 * BATCH:012d}")
    late = other.steps(range(3, 4))
    other.load(folder / f"{BATCH:012d}")
    early = other.steps(range(1, 4))
    return {"told": told, "unsharded": unsharded_duel(), "late": late, "early": early}


def by_engine(world) -> str:
    """The mutation: what is said where DeepSpeed's engine evaluates frozen networks. Nothing can follow it."""
    FrozenEngine.__call__ = lambda self, *inputs: self._engine(*inputs)
    try:
        compare(world, Case("ctm"))
    except RuntimeError as error:
        return str(error)
    return "they passed"


def main() -> None:
    world = rank.join()
    results: dict = {"exact": {str(case): compare(world, case) for case in CASES}}
    results["duel"] = duel(world, Path(sys.argv[1]))
    rank.report(results | {"by_engine": by_engine(world)})


if __name__ == "__main__":
    rank.run(main)
