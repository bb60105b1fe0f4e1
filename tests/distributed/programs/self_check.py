"""self_check.py: tangents of sharded networks against differences, and whether a check leaves the run as it was."""

import sys

import rank
import torch

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import single_pass
from sctrain.config.schema import OptimizerConfig
from sctrain.self_check import Arguments, verify
from sctrain.zero import engine as zero_engine
from sctrain.zero.engine import StudentEngine

BATCH = 4


def network(seed: int = 1):
    torch.manual_seed(seed)
    made = build_network(DiTOptions(width=32, depth=2, heads=2, dropout=0.1), 1, 8, 8, Conditioning(10))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def inputs(world) -> Arguments:
    g = torch.Generator().manual_seed(world.rank)
    u, t_u = torch.randn(2, BATCH, 1, 8, 8, generator=g)
    return Arguments((u, torch.rand(BATCH, generator=g)), (t_u, torch.ones(BATCH)), (torch.arange(BATCH),))


def config(stage: int, bf16: bool, threshold: int) -> dict:
    zero = {"stage": stage, "memory_efficient_linear": False, "stage3_param_persistence_threshold": threshold}
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
    }


def run(world, stage: int, bf16: bool, threshold: int, checked: bool) -> dict:
    """Losses of four steps; where `checked`, the tangents are verified before the first and after the second."""
    student, arguments = StudentEngine(network(), OptimizerConfig(), config(stage, bf16, threshold)), inputs(world)
    losses, verdicts, released = [], [], []
    for step in range(4):
        torch.manual_seed(10 * step + world.rank)
        if checked and step in (0, 2):
            with student.in_float32(lambda _: network(7), world.device) as exact:
                verdict = verify(single_pass, student, exact.network, exact.module, arguments, world)
            verdicts.append({"blocks": verdict.blocks, "running": verdict.running})
            if bf16 and stage == 3:
                released.append(sum(p.ds_tensor.numel() for p in exact.module.parameters()))
        (value, _), tangent = single_pass(student, arguments.primals, arguments.direction, *arguments.conditions)
        loss = (value - tangent).square().mean()
        student.backward(loss)
        assert student.step(1e-3).applied
        losses.append(loss.item())
    return {"losses": losses, "verdicts": verdicts, "released": released}


def main() -> None:
    world, results = rank.join(), {}
    for name, settings in {
        "fp32": (3, False, 0),
        "fp32-persistent": (3, False, 10_000),
        "bf16": (3, True, 0),
        "bf16-persistent": (3, True, 10_000),
        "replicated": (0, False, 0),
        "bf16-replicated": (0, True, 0),
    }.items():
        plain, checked = (run(world, *settings, checked=checked) for checked in (False, True))
        results[name] = checked | {"plain": plain["losses"]}
    real = zero_engine.carry_tangents
    zero_engine.carry_tangents = lambda module: real(module) or _spoil(module)
    results["spoilt"] = run(world, 3, False, 0, checked=True)["verdicts"]
    results["compiler"] = "torch._inductor.compile_fx" in sys.modules
    rank.report(results)


def _spoil(module) -> None:
    """A hook that lets only half of a tangent pass."""
    hook = module.blocks[1].up.pre_bwd_fn
    passing = hook.apply

    def half(x):
        x = passing(x)
        if hasattr(x, "tangent"):
            x.tangent = 0.5 * x.tangent
        return x

    hook.apply = half


if __name__ == "__main__":
    rank.run(main)
