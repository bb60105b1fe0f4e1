"""The whole training state of an engine, to and from a checkpoint: masters, moments, optimizer step, and followers.

A second engine that is trained beside it has the same under names of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sctrain.errors import OwnUserError, UserError
from sctrain.zero.checkpoint import Checkpointer, load, read_record
from sctrain.zero.memory import Memory
from sctrain.zero.pieces import Piece
from sctrain.zero.shards import MASTER, Shards

OPTIMIZER_STEP = "optimizer_step"
BESIDE = "beside"
BESIDE_STEP = "beside_step"


class Follower(Protocol):
    """Weights that follow the masters: EMA tracks, a target network."""

    def pieces(self) -> dict[str, Piece]: ...

    def load(self, key: str, values: Tensor) -> None: ...

    def refresh(self) -> None:
        """To be called when all is loaded."""


def state_pieces(shards: Shards, followers: Sequence[Follower], beside: Shards | None = None) -> dict[str, Piece]:
    """Every tensor of the state by `master/NAME`, `exp_avg/NAME`, `ema-0.05/NAME` and so on; views, not copies."""
    kinds = (MASTER, *shards.moments)
    pieces = {f"{kind}/{shard.name}": shard.piece(kind) for kind in kinds for shard in shards}
    for follower in followers:
        pieces |= follower.pieces()
    if beside is not None:
        pieces |= {f"{BESIDE}/{key}": piece for key, piece in state_pieces(beside, []).items()}
    return pieces


def save_state(
    checkpointer: Checkpointer,
    images: int,
    shards: Shards,
    followers: Sequence[Follower],
    record: dict[str, Any],
    beside: Shards | None = None,
) -> float:
    """Begin to save in the background; see `Checkpointer.save`. Returns the seconds that training stood still."""
    record = {**record, OPTIMIZER_STEP: shards.optimizer_step}
    if beside is not None:
        record[BESIDE_STEP] = beside.optimizer_step
    return checkpointer.save(images, state_pieces(shards, followers, beside), record)


def load_state(
    path: Path,
    shards: Shards,
    followers: Sequence[Follower],
    beside: Shards | None = None,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Restore the state that any number of ranks saved at `path`, and return its record. All ranks take part.

    UserError, on every rank, if the checkpoint is damaged or belongs to another network.
    """
    record = read_record(path)
    shards.set_optimizer_step(record[OPTIMIZER_STEP])
    if beside is not None:
        beside.set_optimizer_step(record.get(BESIDE_STEP, 0))
    values_by_key = _load_on_all_ranks(path, state_pieces(shards, followers, beside))
    owners = {key: follower for follower in followers for key in follower.pieces()}
    with ExitStack() as rewriting:
        for engine in (shards, beside):
            if engine is not None:
                rewriting.enter_context(engine.rewriting())
        for key, values in values_by_key:
            if memory is not None:
                memory.relieve(values.nbytes)
            if key in owners:
                owners[key].load(key, values)
                continue
            engine = beside if key.startswith(f"{BESIDE}/") else shards
            kind, _, name = key.removeprefix(f"{BESIDE}/").partition("/")
            assert engine is not None, "a second engine's keys are wanted only where there is one"
            engine[name].set(kind, values)
    for follower in followers:
        follower.refresh()
    return record


def _load_on_all_ranks(path: Path, wanted: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
    """`load`, which fails on every rank if it fails on one: nobody is left waiting in a collective."""
    refusal, values = None, iter(())
    try:
        values = load(path, wanted)
    except UserError as error:
        refusal = OwnUserError(str(error))
    device = next(iter(wanted.values())).local.device
    refused = torch.tensor(float(refusal is not None), device=device)
    dist.all_reduce(refused, op=dist.ReduceOp.MAX)
    if refused:
        raise refusal or UserError(f"another rank could not read its part of {path}: see its message")
    return values
