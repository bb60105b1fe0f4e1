"""zero_scores.py FOLDER: sCD with score distillation and a guide, five networks of which two are trained, under ZeRO-3.

Ranks take parts of every batch; the unsharded run takes it whole. Saved, and restored into other engines.
"""

import sys
from functools import partial
from pathlib import Path

import rank
import torch
from torch import nn
from zero_tangents import BATCH, EPS, RATE, Case, drawn, relative, shaken, zero_config

from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import Conditioning
from models.registry import build_network
from models.score import Score
from models.tangent.engines import single_pass
from sctrain.beside import Beside
from sctrain.config.objectives import ContinuousObjective, GuidanceRange, ScoreDistillation
from sctrain.config.schema import OptimizerConfig
from sctrain.objectives import build_objective
from sctrain.objectives.base import Guide, Networks
from sctrain.objectives.drawing import Data
from sctrain.zero.checkpoint import Checkpointer
from sctrain.zero.engine import FrozenEngine, StudentEngine
from sctrain.zero.state import load_state, save_state

SHAPE, CLASSES, STEPS = (1, 8, 8), 10, 4
METHOD = ContinuousObjective(name="scd", guidance=GuidanceRange(), vsd=ScoreDistillation())
OBJECTIVE = build_objective(METHOD, Data(0.5, CLASSES), SHAPE)
CASES = [Case("vsd", checkpointing=False), Case("vsd", checkpointing=True, accumulation=2), Case("vsd", stage=0)]

draws = partial(drawn, OBJECTIVE)


def network(seed: int, case: Case, guided: bool = False, width: int = 32) -> nn.Module:
    """No gate is zero."""
    torch.manual_seed(seed)
    options = DiTOptions(width=width, depth=2, heads=2, patch_size=2)
    execution = Execution(checkpointing=case.checkpointing)
    made = build_network(options, *SHAPE, Conditioning(CLASSES, guided=guided), execution=execution)
    return shaken(made)


def score(seed: int, case: Case) -> Score:
    return Score(network(seed, case, guided=True))


class Sharded:
    """All five networks in engines."""

    def __init__(self, world, case: Case, seed: int):
        self.world, self.case = world, case
        config = zero_config(world, case)
        self.student = StudentEngine(network(seed, case, guided=True), OptimizerConfig(eps=EPS), config)
        engine = StudentEngine(score(seed + 1, case), OptimizerConfig(eps=EPS), config)
        self.beside = Beside(engine, lambda rate: 2 * rate, None)
        teacher = FrozenEngine(network(2, case), config, world.device)
        guide = FrozenEngine(network(3, case, width=16), config, world.device)
        guided = Guide(guide, CLASSES)
        self.networks = Networks(self.student, single_pass, teacher, guide=guided, score=engine)

    def steps(self, steps: range) -> list[float]:
        """Means of both losses over all ranks, by micro-batch."""
        size, told = BATCH // self.case.accumulation, []
        share = size // self.world.size
        for step in steps:
            for micro in range(self.case.accumulation):
                mine = micro * size + self.world.rank * share
                loss = OBJECTIVE.loss(draws(step, mine, mine + share), self.networks)
                self.student.backward(loss.per_sample.mean())
                result = self.student.step(RATE)
                assert result is None or result.applied
                assert loss.beside is not None
                self.beside.train(loss.beside, RATE)
                told += [self.world.mean(x.detach().mean()).item() for x in (loss.per_sample, loss.beside)]
        return told

    def save(self, checkpointer: Checkpointer, images: int) -> None:
        save_state(checkpointer, images, self.student.shards, [], {}, self.beside.shards)
        checkpointer.wait()
        self.world.barrier()

    def load(self, path: Path) -> None:
        load_state(path, self.student.shards, [], self.beside.shards)


def unsharded(case: Case) -> tuple[list[float], list[nn.Module]]:
    """The same steps by one process on whole batches, and what was trained."""
    trained = [network(1, case, guided=True), score(2, case)]
    teacher, guide = network(2, case), network(3, case, width=16)
    networks = Networks(trained[0], single_pass, teacher, guide=Guide(guide, CLASSES), score=trained[1])
    rates = (RATE, 2 * RATE)
    adams = [
        torch.optim.Adam(each.parameters(), lr=rate, betas=(0.9, 0.99), eps=EPS)
        for each, rate in zip(trained, rates, strict=True)
    ]
    size, told = BATCH // case.accumulation, []
    for step in range(STEPS):
        for adam in adams:
            adam.zero_grad()
        for micro in range(case.accumulation):
            loss = OBJECTIVE.loss(draws(step, micro * size, (micro + 1) * size), networks)
            for values in (loss.per_sample, loss.beside):
                assert values is not None
                (values.mean() / case.accumulation).backward()
                told.append(values.mean().item())
        for adam in adams:
            adam.step()
    return told, trained


def compare(world, case: Case, folder: Path) -> dict:
    sharded, checkpointer = Sharded(world, case, 1), Checkpointer(folder, 9, world.rank, world.size)
    world.barrier()
    told = sharded.steps(range(2))
    sharded.save(checkpointer, 2 * BATCH)
    told += sharded.steps(range(2, STEPS))
    expected, trained = unsharded(case)
    weights = {
        name: max(_errors(engine, plain))
        for name, engine, plain in zip(
            ("student", "score"), (sharded.student, sharded.beside.engine), trained, strict=True
        )
    }
    other = Sharded(world, case, 7)
    other.load(folder / f"{2 * BATCH:012d}")
    return {"told": told, "expected": expected, "weights": weights, "resumed": other.steps(range(2, STEPS))}


def _errors(engine: StudentEngine, plain: nn.Module) -> list[float]:
    """Relative errors of this rank's parts of the masters."""
    whole = dict(plain.named_parameters())
    found = []
    for shard in engine.shards:
        theirs = whole[shard.name].detach().flatten()[shard.start : shard.stop]
        if theirs.numel():
            found.append(relative(shard.master[: theirs.numel()], theirs))
    assert len(found) > 20, "nothing to compare"
    return found


def main() -> None:
    world = rank.join()
    folder = Path(sys.argv[1])
    rank.report({str(case): compare(world, case, folder / str(number)) for number, case in enumerate(CASES)})


if __name__ == "__main__":
    rank.run(main)
