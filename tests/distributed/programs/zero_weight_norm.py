"""zero_weight_norm.py: train EDM2 networks along their tangents with forced weight normalisation, sharded and whole.

Every rank also trains the whole network on the whole batch by itself: what the sharded one must equal. Rows of the
weights straddle the ranks' intervals.
"""

import deepspeed
import rank
import torch
from torch import Tensor, nn

from models.edm2_options import EDM2Options
from models.layers import Conditioning
from models.magnitude import normalized_weights
from models.registry import build_network
from models.tangent.engines import single_pass
from sctrain.config.schema import OptimizerConfig
from sctrain.zero.ema import ShardedPowerEma
from sctrain.zero.engine import StudentEngine
from sctrain.zero.weight_norm import ForcedWeightNorm

BATCH, STEPS, RATE = 6, 3, 1e-2
SHAPE = (3, 8, 8)
VARIANTS = {  # name, bf16, ZeRO stage, stage3_param_persistence_threshold
    "edm2": ("edm2", False, 3, 0),
    "persistent": ("edm2-scm", False, 3, 1500),
    "bf16": ("edm2-scm", True, 3, 1500),
    "replicated": ("edm2-scm", False, 0, 0),
    "bf16-replicated": ("edm2-scm", True, 0, 0),
}


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = EDM2Options(name, channels=10, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=10)
    network = build_network(options, *SHAPE, Conditioning(7))
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.endswith("gain"):
                parameter.fill_(0.5)
    return network


def batch(step: int, part: slice) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    u, t_u = torch.randn(2, BATCH, *SHAPE, generator=generator)
    t, t_t = torch.rand(2, BATCH, generator=generator)
    labels = torch.randint(8, (BATCH,), generator=generator)
    return tuple(x[part] for x in (u, t, t_u, t_t, labels))


def loss(network, step: int, part: slice) -> Tensor:
    """Moves F along its own tangent."""
    u, t, t_u, t_t, labels = batch(step, part)
    (F, w), t_F = single_pass(network, (u, t), (t_u, t_t), labels)
    return ((F - (F + t_F).detach()).square().flatten(1).mean(1) * w.exp() - w).mean()


def divide(weight: Tensor) -> Tensor:
    """The formula, on the whole weight in float64."""
    wide = weight.double()
    return wide / (wide.square().mean(dim=tuple(range(1, weight.ndim)), keepdim=True).sqrt() + 1e-4)


def whole_run(name: str) -> dict:
    network = fresh(name)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    names = normalized_weights(network)
    losses = []
    for step in range(STEPS + 1):
        with torch.no_grad():
            for key in names:
                weight = network.get_parameter(key)
                weight.copy_(divide(weight))
        value = loss(network, step, slice(None))
        losses.append(value.item())
        if step < STEPS:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return {"losses": losses, "weights": {key: p.detach().double() for key, p in network.named_parameters()}}


def full_weights(engine: StudentEngine) -> dict[str, Tensor]:
    """Of the fp32 masters, on rank 0."""
    return {key: whole.double() for key, whole in ShardedPowerEma(engine.shards, (0.05,)).gather(0.05)}


def compute_weights(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {key: parameter.detach().double() for key, parameter in parameters.items()}


def sharded_run(world, variant: str) -> dict:
    name, bf16, stage, threshold = VARIANTS[variant]
    network = fresh(name)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world.size,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": threshold,
        },
        "bf16": {"enabled": bf16},
    }
    engine = StudentEngine(network, OptimizerConfig(betas=(0.9, 0.99)), config)
    norm = ForcedWeightNorm(engine.shards, network)
    part = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    names, losses, errors = set(normalized_weights(network)), [], []
    moved, unseen = 0.0, 0.0
    for step in range(STEPS + 1):
        before = full_weights(engine)
        norm.apply()
        after = full_weights(engine)
        seen = compute_weights(network)
        for key, weight in after.items():
            expected = divide(before[key]) if key in names else before[key]
            errors.append(((weight - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item())
            moved = max(moved, (weight - before[key]).abs().max().item())
            copy = weight.bfloat16().double() if bf16 else weight
            unseen = max(unseen, (seen[key] - copy).abs().max().item())
        value = loss(engine, step, part)
        losses.append(world.mean(value.detach().double()).item())
        if step < STEPS:
            engine.backward(value)
            assert engine.step(RATE).applied
    return {"losses": losses, "weights": after, "error": max(errors, default=0.0), "moved": moved, "unseen": unseen}


def main() -> None:
    world = rank.join()
    whole = {name: whole_run(name) for name in ("edm2", "edm2-scm")}
    results = {}
    for variant, (name, *_) in VARIANTS.items():
        run, expected = sharded_run(world, variant), whole[name]
        apart = [(weight - expected["weights"][key]).abs().max().item() for key, weight in run.pop("weights").items()]
        results[variant] = run | {"whole_losses": expected["losses"], "apart": max(apart, default=0.0)}
    rank.report(results)
    world.stop()


if __name__ == "__main__":
    rank.run(main)
