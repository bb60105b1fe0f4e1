"""zero_tangents.py half|every: objectives under ZeRO against an unsharded copy of the network.

Every parameter is partitioned (threshold 0), so nothing is there outside its module's hooks. Reports relative errors of
losses, tangents and gradients over optimizer steps, by case. The unsharded run takes the parts of the batch one after
the other, each with its rank's dropout masks. `half` leaves out every second combination of settings, such that any
four of the five still meet in all ways.
"""

import itertools
import sys
from dataclasses import dataclass, replace

import deepspeed
import rank
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import single_pass, tangent_engine
from models.tangent.recorded import recorded
from models.unet_options import ADMOptions, UNetOptions
from sctrain.config.schema import OptimizerConfig
from sctrain.objectives.base import Batch, Draws, Networks, Objective, Progress
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import Diffusion
from sctrain.objectives.early import EarlyContinuous
from sctrain.objectives.levels import Grid
from sctrain.objectives.twins import DiscreteTwin
from sctrain.parameterization import Parameterization
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.zero import engine as zero_engine
from sctrain.zero.engine import FrozenEngine, StudentEngine

BATCH, RATE, STEPS = 12, 1e-2, 2
TEACHER = 2  # the seed of its weights
EPS = 1e-2  # of Adam; a small one turns rounding of tiny gradients into whole steps
CONSISTENCY = dict(
    sigma_data=0.5,
    num_classes=10,
    time_mean=-1.0,
    time_std=1.4,
    label_dropout=0.0,
    tangent_normalization="l2",
    tangent_constant=0.1,
    tangent_warmup_images=0,
)
GRID = Grid(sigma_min=0.02)
OBJECTIVES = {
    "trigflow": Diffusion(0.5, 10, -1.0, 1.4, 0.0),
    "sct": ContinuousConsistency(distill=False, **CONSISTENCY),
    "scd": ContinuousConsistency(distill=True, **CONSISTENCY),
    "segments": ContinuousConsistency(distill=True, segments=3, **CONSISTENCY),
    "scd_discrete": DiscreteTwin(distill=True, **CONSISTENCY),
    "cd_continuous": EarlyContinuous(0.5, 10, 0.0, distill=True, grid=GRID),
    "cd_full": EarlyContinuous(0.5, 10, 0.0, distill=True, grid=GRID, full=True),
}


@dataclass(frozen=True)
class Case:
    """One combination; `wide` tangents are float32 where values are bf16."""

    objective: str = "sct"
    engine: str = "single_pass"
    stage: int = 3
    checkpointing: bool = False
    accumulation: int = 1
    dropout: float = 0.0
    bf16: bool = False
    wide: bool = False
    network: str = "dit"
    option: str = ""  # of ZeRO-3

    def __str__(self) -> str:
        words = [self.objective, self.engine, f"stage{self.stage}"]
        words += [self.option] * bool(self.option)
        words += ["checkpointing"] * self.checkpointing + ["accumulated"] * (self.accumulation > 1)
        words += ["dropout"] * (self.dropout > 0) + ["bf16"] * self.bf16 + ["wide"] * self.wide
        return " ".join(words + [self.network] * (self.network != "dit"))


OPTIONS = ("hpz", "weights-on-cpu", "optimizer-on-cpu")
SETTINGS = list(itertools.product((0, 3), (False, True), (1, 2), (0.0, 0.2), (False, True)))
COMBINATIONS = {
    "every": SETTINGS,
    "half": [chosen for chosen in SETTINGS if sum(s == t for s, t in zip(chosen, SETTINGS[-1], strict=True)) % 2 == 0],
}
OTHERS = [
    *(Case(objective=name, stage=stage) for name in ("trigflow", "scd") for stage in (0, 3)),
    *(Case(objective=name, stage=stage, dropout=0.2) for name in ("segments", "cd_continuous") for stage in (0, 3)),
    *(Case(objective="scd_discrete", stage=stage, dropout=0.2, accumulation=2) for stage in (0, 3)),
    Case(objective="cd_full", engine="recorded", stage=0, dropout=0.2, accumulation=2),
    *(Case(objective="scd", engine=engine, dropout=0.2) for engine in ("two_pass", "finite_difference")),
    *(Case(engine=engine, checkpointing=True) for engine in ("two_pass", "finite_difference")),
    *(Case(stage=stage, checkpointing=True, dropout=0.2) for stage in (1, 2)),
    Case(bf16=True, wide=True, checkpointing=True),
    Case(network="ncsnpp", checkpointing=True, dropout=0.2),
    Case(network="adm", objective="scd", accumulation=2),
    *(Case(objective=name, option=option, accumulation=2) for name in ("sct", "scd") for option in OPTIONS),
]
UNET = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,))
NETWORKS = {
    "dit": DiTOptions(width=32, depth=2, heads=2, patch_size=2),
    "ncsnpp": UNetOptions("ncsnpp", time_scale=0.1, **UNET),
    "adm": ADMOptions(head_channels=4, **UNET),
}


def combinations(which: str) -> list[Case]:
    names = ("stage", "checkpointing", "accumulation", "dropout", "bf16")
    return [Case(**dict(zip(names, chosen, strict=True))) for chosen in COMBINATIONS[which]]


def network(seed: int, case: Case):
    """No gate is zero: a zero tangent would verify nothing."""
    torch.manual_seed(seed)
    options = replace(NETWORKS[case.network], dropout=case.dropout)
    told = Conditioning(10, jumps=case.objective == "segments" and seed != TEACHER)
    made = build_network(options, 1, 8, 8, told, execution=Execution(checkpointing=case.checkpointing))
    return shaken(made)


def shaken(made: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def drawn(objective: Objective, step: int, start: int, stop: int) -> Draws:
    """What an objective draws of samples number `start` to `stop` of a step, images of 1x8x8 in ten classes."""
    positions = range(step * BATCH + start, step * BATCH + stop)
    x0 = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(place)) for place in positions])
    generator = SampleGenerator(1, positions, Purpose.TRAINING)
    return objective.draw(generator, Batch(0.5 * x0, torch.tensor(positions) % 10), Progress(step * BATCH, 1000))


def draws(step: int, case: Case) -> Draws:
    g = torch.Generator().manual_seed(step)
    x0, z = 0.5 * torch.randn(2, BATCH, 1, 8, 8, generator=g)
    t, labels = 0.1 + 1.4 * torch.rand(BATCH, generator=g), torch.randint(0, 11, (BATCH,), generator=g)
    return Draws(x0, z, t, labels, s=0.7 * t if case.objective in ("segments", "scd_discrete") else None)


def part(whole: Draws, number: int, count: int) -> Draws:
    cut = slice(number * BATCH // count, (number + 1) * BATCH // count)
    s = None if whole.s is None else whole.s[cut]
    return Draws(whole.x0[cut], whole.z[cut], whole.t[cut], whole.labels[cut], s=s)


def zero_config(world, case: Case) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH // world.size // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told otherwise
        "bf16": {"enabled": case.bf16},
        "zero_optimization": {
            "stage": case.stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
            **options(world)[case.option],
        },
        "zero_force_ds_cpu_optimizer": False,
    }


def options(world) -> dict[str, dict]:
    """What DeepSpeed is told for each."""
    cpu = {"device": "cpu"}
    settings = {"zero_hpz_partition_size": world.size}, {"offload_param": cpu}, {"offload_optimizer": cpu}
    return {"": {}, **dict(zip(OPTIONS, settings, strict=True))}


class BareEngine:
    """Stages 1 and 2: DeepSpeed alone, for neither EMA nor checkpoints of ours follow them."""

    def __init__(self, network, optimizer: OptimizerConfig, config: dict):
        self.module = network
        adam = torch.optim.Adam(network.parameters(), lr=RATE, betas=optimizer.betas, eps=optimizer.eps)
        self._engine, *_ = deepspeed.initialize(model=network, optimizer=adam, config=config)
        self.backward = self._engine.backward

    def __call__(self, *inputs):
        return self._engine(*inputs)

    def step(self, rate: float):
        self._engine.step()
        return zero_engine.StepResult(self._engine.was_step_applied(), 0.0)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def compare(world, case: Case) -> dict[str, float]:
    """Worst relative errors over the steps."""
    objective, reference = OBJECTIVES[case.objective], network(1, case)
    config = zero_config(world, case)
    make = StudentEngine if case.stage in (0, 3) else BareEngine
    student = make(network(1, case), OptimizerConfig(eps=EPS), config)
    as_recorded = case.engine == "recorded"
    engine = recorded if as_recorded else tangent_engine(case.engine, torch.float32 if case.wide else None)
    seen = Parameterization(0.5, sigma_min=objective.grid.sigma_min if isinstance(objective, EarlyContinuous) else 0.0)
    networks, plain = Networks(seen.of(student), engine), Networks(seen.of(reference), single_pass)
    if as_recorded:
        plain = replace(plain, tangent=recorded)
    if getattr(objective, "distill", False):
        networks = replace(networks, teacher=FrozenEngine(network(TEACHER, case), config, world.device))
        plain = replace(plain, teacher=network(TEACHER, case).requires_grad_(False).eval())
    adam = torch.optim.Adam(reference.parameters(), lr=RATE, betas=(0.9, 0.99), eps=EPS)
    worst = {"loss": 0.0, "tangent_norm": 0.0, "gradient": 0.0}
    parts = case.accumulation * world.size
    for step in range(STEPS):
        adam.zero_grad()
        expected = []
        for number in range(parts):
            torch.manual_seed(100 + number)
            expected.append(objective.loss(part(draws(step, case), number, parts), plain))
            (expected[-1].per_sample.mean() / parts).backward()
        for micro in range(case.accumulation):
            number = micro * world.size + world.rank
            torch.manual_seed(100 + number)
            loss = objective.loss(part(draws(step, case), number, parts), networks)
            student.backward(loss.per_sample.mean())
            if micro < case.accumulation - 1:
                assert student.step(RATE) is None
            errors = {"loss": relative(loss.per_sample, expected[number].per_sample)}
            if "tangent_norm" in loss.diagnostics:
                ours, theirs = (x.diagnostics["tangent_norm"] for x in (loss, expected[number]))
                errors["tangent_norm"] = relative(ours, theirs)
            worst |= {key: max(worst[key], error) for key, error in errors.items()}
        gradients = [
            (safe_get_full_grad(ours).float().flatten(), theirs.grad.flatten())
            for ours, theirs in zip(student.module.parameters(), reference.parameters(), strict=True)
            if theirs.grad is not None and theirs.grad.norm() > 1e-7
        ]
        if case.bf16:  # rounding hits small gradients hard: the whole counts
            gradients = [tuple(map(torch.cat, zip(*gradients, strict=True)))]
        assert len(gradients) > 20 or case.bf16, "nothing to compare"
        worst["gradient"] = max(worst["gradient"], *(relative(*pair) for pair in gradients))
        assert student.step(RATE).applied
        adam.step()
    return worst


def dropped(world) -> dict:
    """A step that is not accepted, or not finite on one rank, moves no rank's weights, and says so."""
    results = {}
    for stage in (0, 3):
        case = Case(stage=stage)
        student = StudentEngine(network(1, case), OptimizerConfig(), zero_config(world, case))
        networks = Networks(student, single_pass)
        mine = part(draws(0, case), world.rank, world.size)
        before = OBJECTIVES["sct"].loss(mine, networks).per_sample.detach()
        norms = []
        for factor, accept in ((float("nan"), True), (1.0, False), (1.0, True)):
            loss = OBJECTIVES["sct"].loss(mine, networks).per_sample.mean()
            student.backward(loss * (factor if world.rank == 0 else 1.0))
            result = student.step(RATE, lambda norm, a=accept, n=norms: n.append(norm) or a)
            after = OBJECTIVES["sct"].loss(mine, networks).per_sample
            results[f"stage{stage} {factor} {accept}"] = [result.applied, torch.equal(before, after), result.grad_norm]
        results[f"stage{stage} asked"] = norms
        results[f"stage{stage} steps"] = student.shards.optimizer_step
    return results


def unpatched(world) -> str:
    """The mutation: what is said where DeepSpeed's hooks are left as they are. Nothing can follow it."""
    zero_engine.carry_tangents = lambda module: None
    try:
        compare(world, Case())
    except NotImplementedError as error:
        return str(error)
    return "they passed"


def main() -> None:
    world = rank.join()
    results: dict = {str(case): compare(world, case) for case in [*combinations(sys.argv[1]), *OTHERS]}
    results["dropped"] = dropped(world)
    rank.report(results | {"unpatched": unpatched(world)})


if __name__ == "__main__":
    rank.run(main)
