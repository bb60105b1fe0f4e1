"""zero_tangents.py exact|unpatched: objectives under ZeRO-3 against an unsharded copy of the network.

Every parameter is partitioned (threshold 0), so nothing is there outside its module's hooks. Reports relative errors of
losses, tangents and gradients, and of the losses after optimizer steps.
"""

import sys

import rank
import torch
from deepspeed.utils import safe_get_full_grad

from models.dit import DiTOptions
from models.registry import build_network
from models.tangent.engines import finite_difference, single_pass
from sctrain.config.schema import OptimizerConfig
from sctrain.objectives.base import Draws, Networks
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import TrigFlowDiffusion
from sctrain.zero import engine as zero_engine
from sctrain.zero.engine import FrozenEngine, StudentEngine

BATCH, RATE = 12, 1e-2
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
OBJECTIVES = {
    "trigflow": TrigFlowDiffusion(0.5, 10, -1.0, 1.4, 0.0),
    "sct": ContinuousConsistency(distill=False, **CONSISTENCY),
    "scd": ContinuousConsistency(distill=True, **CONSISTENCY),
}


def network(seed: int):
    """No gate is zero: a zero tangent would verify nothing."""
    torch.manual_seed(seed)
    made = build_network(DiTOptions(width=32, depth=2, heads=2, patch_size=2), 1, 8, 8, 10)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def draws(step: int) -> Draws:
    g = torch.Generator().manual_seed(step)
    x0, z = 0.5 * torch.randn(2, BATCH, 1, 8, 8, generator=g)
    return Draws(x0, z, 0.1 + 1.4 * torch.rand(BATCH, generator=g), torch.randint(0, 11, (BATCH,), generator=g))


def part(whole: Draws, number: int, count: int) -> Draws:
    cut = slice(number * BATCH // count, (number + 1) * BATCH // count)
    return Draws(whole.x0[cut], whole.z[cut], whole.t[cut], whole.labels[cut])


def zero_config(world, accumulation: int, bf16: bool) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told otherwise
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
    }


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def compare(world, name: str, accumulation: int = 1, tangent=single_pass) -> dict[str, float]:
    """Worst relative errors over three optimizer steps."""
    objective, reference, teacher = OBJECTIVES[name], network(1), network(2)
    config = zero_config(world, accumulation, bf16=False)
    student = StudentEngine(network(1), OptimizerConfig(eps=EPS), config)
    networks = Networks(student, tangent, FrozenEngine(network(2), config))
    plain = Networks(reference, single_pass, teacher.requires_grad_(False))
    adam = torch.optim.Adam(reference.parameters(), lr=RATE, betas=(0.9, 0.99), eps=EPS)
    worst = {"loss": 0.0, "tangent_norm": 0.0, "gradient": 0.0}
    for step in range(3):
        expected = objective.loss(draws(step), plain)
        adam.zero_grad()
        expected.per_sample.mean().backward()
        for micro in range(accumulation):
            number = micro * world.size + world.rank
            mine = part(draws(step), number, accumulation * world.size)
            loss = objective.loss(mine, networks)
            student.backward(loss.per_sample.mean())
            if micro < accumulation - 1:
                assert student.step(RATE) is None
            cut = slice(number * len(mine.t), (number + 1) * len(mine.t))
            errors = {"loss": relative(loss.per_sample, expected.per_sample[cut])}
            if "tangent_norm" in loss.diagnostics:
                ours, theirs = (x.diagnostics["tangent_norm"] for x in (loss, expected))
                errors["tangent_norm"] = relative(ours, theirs[cut])
            worst |= {key: max(worst[key], error) for key, error in errors.items()}
        for ours, theirs in zip(student.module.parameters(), reference.parameters(), strict=True):
            if theirs.grad is not None and theirs.grad.norm() > 1e-7:
                worst["gradient"] = max(worst["gradient"], relative(safe_get_full_grad(ours), theirs.grad))
        assert student.step(RATE).applied
        adam.step()
    return worst


def skipped(world) -> dict:
    """A non-finite gradient on one rank: no rank's weights move, and the step says so."""
    student = StudentEngine(network(1), OptimizerConfig(), zero_config(world, 1, bf16=False))
    networks = Networks(student, single_pass)
    mine = part(draws(0), world.rank, world.size)
    before = OBJECTIVES["sct"].loss(mine, networks).per_sample.detach()
    loss = OBJECTIVES["sct"].loss(mine, networks).per_sample.mean()
    student.backward(loss * float("nan") if world.rank == 0 else loss)
    result = student.step(RATE)
    after = OBJECTIVES["sct"].loss(mine, networks).per_sample
    return {"applied": result.applied, "unmoved": torch.equal(before, after)}


def bf16(world) -> dict:
    """Weights in bf16: the run moves, and the value of the loss stays near the one in float32."""
    student = StudentEngine(network(1), OptimizerConfig(), zero_config(world, 1, bf16=True))
    mine = part(draws(0), world.rank, world.size)
    loss = OBJECTIVES["trigflow"].loss(mine, Networks(student, single_pass)).per_sample
    expected = OBJECTIVES["trigflow"].loss(mine, Networks(network(1), single_pass)).per_sample
    student.backward(loss.mean())
    sct = OBJECTIVES["sct"].loss(mine, Networks(student, single_pass))
    student.step(RATE)
    moved = OBJECTIVES["trigflow"].loss(mine, Networks(student, single_pass)).per_sample
    return {
        "error": relative(loss, expected),
        "dtype": str(loss.dtype),
        "finite": bool(sct.per_sample.isfinite().all()),
        "moved": not torch.equal(moved, loss),
    }


def main() -> None:
    world, results = rank.join(), {}
    if sys.argv[1] == "unpatched":
        zero_engine.carry_tangents = lambda module: None
        try:
            compare(world, "sct")
        except RuntimeError as error:
            results["error"] = str(error)
    else:
        for name in OBJECTIVES:
            results[name] = compare(world, name)
        results["accumulated"] = compare(world, "scd", accumulation=2)
        results["difference"] = compare(world, "scd", tangent=finite_difference)
        results |= {"skipped": skipped(world), "bf16": bf16(world)}
    rank.report(results)


if __name__ == "__main__":
    main()
