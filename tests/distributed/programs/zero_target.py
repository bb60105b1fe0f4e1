"""zero_target.py save|load FOLDER: discrete consistency with target networks, against an unsharded run.

Every case takes a few steps on a schedule of learning rates and reports its worst relative errors in losses, gradients,
weights and target; then it is saved, and restored on any number of ranks. The weighting head has no part in these
losses, so there are parameters without a gradient. The unsharded run takes the ranks' parts one after the other.
"""

import copy
import sys
from pathlib import Path

import rank
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import single_pass
from sctrain.config import objectives as config
from sctrain.config.schema import OptimizerConfig
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.drawing import Data
from sctrain.parameterization import Parameterization
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.schedules import learning_rate
from sctrain.zero.checkpoint import Checkpointer, latest
from sctrain.zero.engine import FrozenEngine, StudentEngine
from sctrain.zero.pieces import Piece
from sctrain.zero.state import load_state, save_state
from sctrain.zero.target import TargetNetwork

BATCH, STEPS, SHAPE, CLASSES = 12, 8, (1, 4, 4), 3
BUDGET = 2 * STEPS * BATCH
METHODS = {
    "cd": config.ConsistencyDistillation(name="cd", target_decay=0.9),
    "ct": config.ConsistencyTraining(name="ct", last_levels=20),
    "ict": config.ImprovedTraining(name="ict"),  # the target is the student itself
}
CASES = {  # method, optimizer, bf16, ZeRO stage
    "cd adam stage3": ("cd", "adam", False, 3),
    "cd radam stage0": ("cd", "radam", False, 0),
    "cd radam stage3 bf16": ("cd", "radam", True, 3),
    "cd adam stage0 bf16": ("cd", "adam", True, 0),
    "ct radam stage3": ("ct", "radam", False, 3),
    "ct adam stage0": ("ct", "adam", False, 0),
    "ict radam stage3": ("ict", "radam", False, 3),
}


def network(seed: int) -> nn.Module:
    """With dropout, and no gate left at zero."""
    torch.manual_seed(seed)
    options = DiTOptions(width=16, depth=1, heads=2, patch_size=2, dropout=0.2)
    made = build_network(options, *SHAPE, Conditioning(CLASSES))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


class Run:
    """A student with its target and teacher on engines; or plain modules, if there is no world."""

    def __init__(self, case: str, world=None, seed: int = 1):
        name, optimizer, bf16, stage = CASES[case]
        self.world, method = world, METHODS[name]
        self.objective = build_objective(method, Data(0.5, CLASSES), SHAPE)
        # eps: a small one turns rounding of tiny gradients into whole steps. The ramp ends at step 3, the rate falls
        # from step 4 on.
        rates = {"learning_rate": 0.1, "ramp_images": 3 * BATCH, "reference_images": 4 * BATCH}
        self.settings = OptimizerConfig(name=optimizer, betas=(0.9, 0.9), eps=1e-2, **rates)
        self.module, teacher, self.target = network(seed), network(2), None
        if world is None:
            make = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}[optimizer]
            self.optimizer = make(self.module.parameters(), lr=1.0, betas=(0.9, 0.9), eps=1e-2)
            student, teacher = self.module, teacher.requires_grad_(False).eval()
            self.target = copy.deepcopy(self.module) if method.has_target else None
        else:
            zero = {
                "train_micro_batch_size_per_gpu": BATCH // world.size,
                "gradient_clipping": 0.0,
                "bf16": {"enabled": bf16},
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            }
            student = self.engine = StudentEngine(self.module, self.settings, zero)
            teacher = FrozenEngine(teacher, zero, world.device)
            if method.has_target:
                self.target = TargetNetwork(self.engine.shards, network(3), zero, world.device)
        as_F = Parameterization(0.5, "t", method.anchor).of
        self.networks = Networks(as_F(student), single_pass, teacher, self.target and as_F(self.target))

    def loss(self, step: int, part: int, parts: int) -> Loss:
        """Of one rank's part of the batch, under its dropout masks."""
        torch.manual_seed(1000 * step + part)
        return self.objective.loss(self.draws(step, part, parts), self.networks)

    def draws(self, step: int, part: int, parts: int) -> Draws:
        positions = torch.arange(step * BATCH, (step + 1) * BATCH).chunk(parts)[part]
        generator = SampleGenerator(0, positions, Purpose.INITIAL_NOISE)
        batch = Batch(0.5 * generator.normal(SHAPE), positions % CLASSES)
        return self.objective.draw(SampleGenerator(0, positions, Purpose.TRAINING), batch, progress(step))

    def rate(self, step: int) -> float:
        return learning_rate(self.settings, step * BATCH + BATCH // 2, BUDGET)

    def keep(self, step: int) -> float | None:
        return self.objective.target_keep(progress(step), progress(step + 1))

    def plain_step(self, step: int, parts: int) -> list[Tensor]:
        """Per-sample losses of the parts; gradients stay until the next step."""
        self.optimizer.zero_grad()
        losses = [self.loss(step, part, parts).per_sample for part in range(parts)]
        (sum(loss.mean() for loss in losses) / parts).backward()
        self.optimizer.param_groups[0]["lr"] = self.rate(step)
        return losses

    def follow(self, step: int) -> None:
        self.optimizer.step()
        if self.target is not None:
            for average, own in zip(self.target.parameters(), self.module.parameters(), strict=True):
                average.data.lerp_(own.data, 1 - self.keep(step))

    def train(self, steps: range) -> list[float]:
        """On engines; this rank's losses."""
        losses = []
        for step in steps:
            loss = self.loss(step, self.world.rank, self.world.size).per_sample.mean()
            self.engine.backward(loss)
            assert self.engine.step(self.rate(step)).applied
            if self.target is not None:
                self.target.update(self.keep(step))
            losses.append(loss.item())
        return losses

    def masters(self) -> dict[str, Tensor]:
        return whole({shard.name: shard.piece("master") for shard in self.engine.shards})

    def averages(self) -> dict[str, Tensor]:
        return whole({key.partition("/")[2]: piece for key, piece in self.target.pieces().items()})

    @property
    def followers(self) -> list:
        return [] if self.target is None else [self.target]


def progress(step: int) -> Progress:
    return Progress(step * BATCH, BUDGET)


def whole(pieces: dict[str, Piece]) -> dict[str, Tensor]:
    """The tensors that all ranks hold together, on every rank, in float64."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: piece.local.clone() for name, piece in pieces.items()})
    return {
        name: torch.cat([part[name] for part in parts]).view(piece.shape).double() for name, piece in pieces.items()
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs).norm() / theirs.double().norm().clamp_min(1e-12)).item()


def compare(world, run: Run, plain: Run) -> dict:
    """Worst errors over the steps, and how far things moved."""
    worst = dict.fromkeys(("loss", "gradient", "average"), 0.0)
    expected, unused = run.masters(), set()
    for step in range(STEPS):
        theirs = plain.plain_step(step, world.size)[world.rank]
        loss = run.loss(step, world.rank, world.size).per_sample
        run.engine.backward(loss.mean())
        errors = {"loss": relative(loss, theirs.detach())}
        pairs = []
        for (name, ours), reference in zip(run.module.named_parameters(), plain.module.parameters(), strict=True):
            gradient = safe_get_full_grad(ours)
            if reference.grad is None:
                unused.add(name)
                assert gradient is None or not gradient.any(), f"{name} has no part in the loss"
            else:
                pairs.append((gradient.double().flatten(), reference.grad.double().flatten()))
        errors["gradient"] = relative(*map(torch.cat, zip(*pairs, strict=True)))
        assert run.engine.step(run.rate(step)).applied
        plain.follow(step)
        if run.target is not None:
            run.target.update(run.keep(step))
            expected = {
                name: run.keep(step) * expected[name] + (1 - run.keep(step)) * master
                for name, master in run.masters().items()
            }
            errors["average"] = max(
                (average - expected[name]).abs().max().item() for name, average in run.averages().items()
            )
        worst |= {key: max(worst[key], error) for key, error in errors.items()}
    flat = torch.cat([master.flatten() for master in run.masters().values()])
    reference = torch.cat([parameter.detach().double().flatten() for parameter in plain.module.parameters()])
    start = torch.cat([p.detach().flatten() for p in network(1).parameters()])
    worst["weights"] = ((flat - reference).norm() / (reference - start).norm()).item()
    return worst | {"unused": sorted(unused), "moved": relative(reference, start.double())}


def evaluated(world, run: Run, plain: Run) -> dict:
    """The target's engine computes with its average; after `keep` 0 that is the student, after 1 it is as it was."""
    draws = run.draws(0, world.rank, world.size)
    inputs = (draws.x0 / 0.5, draws.t, draws.labels)

    def errors() -> float:
        run.target._module.eval()
        plain.target.eval()
        for parameter, average in zip(plain.target.parameters(), run.averages().values(), strict=True):
            parameter.data.copy_(average)
        return relative(run.target(*inputs)[0], plain.target(*inputs)[0].detach())

    results = {"computes": errors()}
    before = run.averages()
    run.target.update(1.0)
    results["kept"] = same(before, run.averages())
    run.target.update(0.0)
    results["copied"] = same(run.averages(), run.masters()) and not same(before, run.averages())
    results["computes_copy"] = errors()
    return results


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fingerprint(run: Run) -> dict[str, float]:
    """Of the target and the masters, by parameter."""
    tensors = {f"master/{name}": value for name, value in run.masters().items()}
    if run.target is not None:
        tensors |= {f"target/{name}": value for name, value in run.averages().items()}
    places = {name: torch.arange(1.0, value.numel() + 1).double() for name, value in tensors.items()}
    return {name: (value.flatten() @ places[name]).item() for name, value in tensors.items()}


def teaches(world) -> bool:
    """A target that is a teacher has no dropout: two evaluations agree."""
    run = Run("cd adam stage3", world)
    zero = run.engine._config
    draws = run.draws(0, world.rank, world.size)
    inputs, said = (draws.x0, draws.t, draws.labels), {}
    for shares in (True, False):
        target = TargetNetwork(run.engine.shards, network(3), zero, world.device, shares_masks=shares)
        said[shares] = torch.equal(target(*inputs)[0], target(*inputs)[0])
    return said[False] and not said[True]


def save(world, folder: Path) -> dict:
    results: dict = {"teaches": teaches(world)}
    for case in CASES:
        run, plain = Run(case, world), Run(case)
        results[case] = compare(world, run, plain)
        checkpoints = Checkpointer(folder / case, 1, world.rank, world.size)
        world.barrier()
        save_state(checkpoints, STEPS * BATCH, run.engine.shards, run.followers, {})
        results[case]["fingerprint"] = fingerprint(run)
        results[case]["losses"] = run.train(range(STEPS, STEPS + 2))
        checkpoints.wait()
        world.barrier()
        fresh = Run(case, world, seed=5)
        load_state(latest(folder / case), fresh.engine.shards, fresh.followers)
        results[case]["restored"] = fingerprint(fresh) == results[case]["fingerprint"]
        results[case]["restored_losses"] = fresh.train(range(STEPS, STEPS + 2))
        if run.target is not None:
            results[case] |= evaluated(world, run, plain)
    return results


def load(world, folder: Path) -> dict:
    results = {}
    for case in CASES:
        run = Run(case, world, seed=6)
        load_state(latest(folder / case), run.engine.shards, run.followers)
        found = fingerprint(run)
        run.train(range(STEPS, STEPS + 1))
        results[case] = {"fingerprint": found}
    return results


def main() -> None:
    world = rank.join()
    rank.report({"save": save, "load": load}[sys.argv[1]](world, Path(sys.argv[2])))


if __name__ == "__main__":
    rank.run(main)
