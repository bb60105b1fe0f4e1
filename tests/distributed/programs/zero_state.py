"""zero_state.py save|load FOLDER: train a small network, save its state; restore it on any number of ranks.

Every variant trains 3 steps, saves, and trains 3 more; a restored one must repeat these. Parameters of 15, 5 and 1
elements divide by no number of ranks.
"""

import os
import signal
import sys
from pathlib import Path

import deepspeed
import rank
import torch
from torch import Tensor, nn

import sctrain.zero.checkpoint as checkpoint
from sctrain.config.schema import OptimizerConfig
from sctrain.errors import UserError
from sctrain.power_ema import decay, gamma_from_width
from sctrain.zero.checkpoint import Checkpointer
from sctrain.zero.ema import ShardedPowerEma
from sctrain.zero.engine import StudentEngine
from sctrain.zero.memory import DiskMemory
from sctrain.zero.shards import MASTER
from sctrain.zero.state import load_state, save_state, state_pieces

BATCH, FOLDER = 12, Path(sys.argv[2])
WIDTHS = (0.05, 0.1)
VARIANTS = {  # optimizer, bf16, ZeRO stage, threshold of persistence (of 33 * 5 and less stays whole), offload
    "fp32": ("adam", False, 3, 0, None),
    "persistent": ("radam", False, 3, 165, None),
    "bf16": ("radam", True, 3, 0, None),
    "bf16-persistent": ("adam", True, 3, 165, None),
    "replicated": ("adam", False, 0, 0, None),
    "bf16-replicated": ("radam", True, 0, 0, None),
    "cpu": ("adam", False, 3, 0, "cpu"),
    "bf16-cpu": ("radam", True, 3, 165, "cpu"),
    "disk": ("radam", False, 3, 165, "disk"),
    "bf16-disk": ("adam", True, 3, 0, "disk"),
    "weights-on-cpu": ("adam", False, 3, 165, "weights"),
    "hpz": ("adam", True, 3, 0, "hpz"),
    "bf16-disk-as-on-gpus": ("adam", True, 3, 165, "cpu+disk"),
}


class Run:
    """One engine with its shards and EMA."""

    def __init__(self, world, variant: str, seed: int):
        name, bf16, stage, threshold, offload = VARIANTS[variant]
        torch.manual_seed(seed)
        layers = nn.Linear(7, 33), nn.SiLU(), nn.Linear(33, 5), nn.SiLU(), nn.Linear(5, 3), nn.Linear(3, 1)
        network = nn.Sequential(*layers)
        config = {
            "train_micro_batch_size_per_gpu": BATCH // world.size,
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": threshold,
                "sub_group_size": 100,  # several groups, which are stepped one by one
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
        }
        if offload and "cpu" in offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        if offload == "weights":
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        if offload == "hpz":
            config["zero_optimization"]["zero_hpz_partition_size"] = world.size
        disk = DiskMemory(FOLDER / "disk") if offload and "disk" in offload else None
        self.world, self.dtype = world, torch.bfloat16 if bf16 else torch.float32
        self.engine = StudentEngine(network, OptimizerConfig(name=name, betas=(0.9, 0.999)), config, disk)
        self.shards, self.memory = self.engine.shards, disk
        self.ema = ShardedPowerEma(self.shards, WIDTHS, disk)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 1, generator=generator)
        mine = slice(self.world.rank * BATCH // self.world.size, (self.world.rank + 1) * BATCH // self.world.size)
        return x[mine].to(self.dtype), y[mine].to(self.dtype)

    def loss(self, step: int) -> Tensor:
        x, y = self._batch(step)
        return ((self.engine(x) - y) ** 2).float().mean()

    def train(self, steps: range) -> list[float]:
        """Losses over all ranks before each step."""
        losses = []
        for step in steps:
            loss = self.loss(step)
            self.engine.backward(loss)
            assert self.engine.step(1e-2).applied
            self.ema.update(step * BATCH, (step + 1) * BATCH)
            losses.append(self.world.sum(loss.detach()).item() / self.world.size)
        return losses

    def state(self) -> dict[str, Tensor]:
        return {key: piece.local.clone() for key, piece in state_pieces(self.shards, [self.ema]).items()}

    def fingerprint(self) -> dict[str, float]:
        """Sum over all ranks of every tensor of the state, weighted by position."""
        return {
            key: self.world.sum(
                (piece.local.double() * torch.arange(piece.start + 1, piece.stop + 1, dtype=torch.float64)).sum()
            ).item()
            for key, piece in state_pieces(self.shards, [self.ema]).items()
        }

    def full_weights(self) -> dict[str, Tensor]:
        parameters = dict(self.engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values())):  # of ZeRO-0: as they are
            return {name: parameter.detach().double() for name, parameter in parameters.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def newest(folder: Path) -> Path:
    path = checkpoint.latest(folder)
    assert path is not None
    return path


def save(world, folder: Path) -> dict:
    """Saved, trained on, and restored into a second, differently initialised engine."""
    results = {}
    for variant in VARIANTS:
        run = Run(world, variant, seed=0)
        copies = "disk" not in variant
        checkpointer = Checkpointer(folder / variant, 2, world.rank, world.size, copies=copies, memory=run.memory)
        world.barrier()
        initial = run.state()
        save_state(checkpointer, 0, run.shards, [run.ema], {"note": "untrained"})
        run.train(range(3))
        saved, fingerprint = run.state(), run.fingerprint()
        stall = save_state(checkpointer, 3 * BATCH, run.shards, [run.ema], {"note": variant})
        losses = run.train(range(3, 6))
        checkpointer.wait()
        world.barrier()
        fresh = Run(world, variant, seed=1)
        fresh_step = fresh.shards.optimizer_step
        found = newest(folder / variant)
        record = load_state(found, fresh.shards, [fresh.ema])
        results[variant] = {
            "losses": losses,
            "stall": stall,
            "fingerprint": fingerprint,
            "fresh_step": fresh_step,
            "moments_before_training": any(not key.startswith(("master", "ema")) for key in initial),
            "found": found.name,
            "record": record,
            "state_restored": same(saved, fresh.state()),
            "restored_losses": fresh.train(range(3, 6)),
        }
        load_state(found.with_name("0" * 12), fresh.shards, [fresh.ema])  # into an engine that has moments
        results[variant]["untrained_restored"] = same(initial, fresh.state())
        results[variant]["retrained_losses"] = fresh.train(range(6))
    return results


def load(world, folder: Path) -> dict:
    """Restored on another number of ranks."""
    results = {}
    for variant in VARIANTS:
        run = Run(world, variant, seed=2)
        run.train(range(20, 21))  # whole copies of small parameters and moments exist, and are to be overwritten
        record = load_state(newest(folder / variant), run.shards, [run.ema])
        results[variant] = {"record": record, "fingerprint": run.fingerprint(), "losses": run.train(range(3, 6))}
    return results


def damaged(world, folder: Path) -> str:
    """What a rank says when one file is corrupt, its own or not."""
    run, checkpointer = Run(world, "persistent", seed=7), Checkpointer(folder / "damaged", 1, world.rank, world.size)
    world.barrier()
    save_state(checkpointer, 12, run.shards, [run.ema], {})
    checkpointer.wait()
    world.barrier()
    path = newest(folder / "damaged")
    if world.rank == 1:
        (path / "rank-00001.safetensors").write_bytes(b"damage")
    world.barrier()
    try:
        load_state(path, run.shards, [run.ema])
    except UserError as error:
        return str(error)
    return "loaded"


def ema(world) -> dict:
    """Largest relative difference from an EMA of the whole weights; the second engine has an untouched EMA."""
    run, untouched = Run(world, "fp32", seed=3), Run(world, "persistent", seed=4)
    expected = dict.fromkeys(WIDTHS, run.full_weights())
    for step in range(50, 54):
        run.train(range(step, step + 1))
        for width in WIDTHS:
            keep, now = decay(step * BATCH, (step + 1) * BATCH, gamma_from_width(width)), run.full_weights()
            expected[width] = {name: now[name] + keep * (old - now[name]) for name, old in expected[width].items()}
    errors, shapes = [], {}
    for width in WIDTHS:
        for name, whole in run.ema.gather(width):
            errors.append(((whole - expected[width][name]).abs().max() / expected[width][name].abs().max()).item())
            shapes[name] = list(whole.shape)
    weights = untouched.full_weights()
    unchanged = [torch.equal(whole.double(), weights[name]) for name, whole in untouched.ema.gather(0.1)]
    moved = (run.shards["0.weight"].master - run.ema.pieces()["ema-0.05/0.weight"].local).abs().max().item()
    return {"errors": errors, "shapes": shapes, "unchanged": unchanged, "moved": moved}


def rewrite(world) -> dict:
    """A master set through the shards reaches the next forward, of partitioned and of whole parameters, in bf16 too."""
    losses = {}
    for variant in VARIANTS:
        run = Run(world, variant, seed=5)
        run.train(range(1))
        with run.shards.rewriting():
            for shard in run.shards:
                shard.set(MASTER, torch.zeros_like(shard.master))
        loss = run.loss(0).detach()
        target = (run._batch(0)[1] ** 2).float().mean()
        losses[variant] = [loss.item(), target.item()]
    return losses


def die_while_saving(world, folder: Path) -> dict:
    """Rank 1 is killed in the middle of its file; rank 0 gives up and the older checkpoint is still good."""
    run = Run(world, "fp32", seed=6)
    checkpointer = Checkpointer(folder / "killed", 2, world.rank, world.size, patience_seconds=1)
    world.barrier()
    save_state(checkpointer, 12, run.shards, [run.ema], {})
    checkpointer.wait()
    world.barrier()
    if world.rank == 1:
        checkpoint.write_tensors = _write_half_and_die
    save_state(checkpointer, 24, run.shards, [run.ema], {})
    try:
        checkpointer.wait()
    except UserError as error:
        pieces = state_pieces(run.shards, [run.ema])
        restored = dict(checkpoint.load(newest(folder / "killed"), pieces))
        names = sorted(path.name for path in (folder / "killed").iterdir())
        good = all(torch.equal(values, pieces[key].local) for key, values in restored.items())
        return {"error": str(error), "names": names, "loaded": good and bool(restored)}
    raise AssertionError("a checkpoint without rank 1's part was completed")


def _write_half_and_die(path: Path, *_: object) -> None:
    path.write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    mode, folder = sys.argv[1], FOLDER
    world = rank.join()
    if mode == "load":
        rank.report(load(world, folder))
        return world.stop()
    results: dict = {"save": save(world, folder), "ema": ema(world), "rewrite": rewrite(world)}
    results["damaged"] = damaged(world, folder)
    rank.report(results)
    rank.report(results | {"killed": die_while_saving(world, folder)})


if __name__ == "__main__":
    rank.run(main)
