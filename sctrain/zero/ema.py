"""Power-function EMA of the fp32 masters, kept on the shards: an update needs no communication (EDM2 section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sctrain import power_ema
from sctrain.zero.memory import Memory
from sctrain.zero.pieces import Piece
from sctrain.zero.shards import Shard, Shards


class ShardedPowerEma:
    """Tracks of given relative widths; before any update they equal the weights."""

    def __init__(self, shards: Shards, widths: Sequence[float], memory: Memory | None = None):
        """Start from the present masters, in `memory`; the relative widths sigma_rel lie in (0, 0.288)."""
        self._shards, self._memory = shards, memory or Memory()
        self._gammas = {width: power_ema.gamma_from_width(width) for width in widths}
        self._tracks = {width: self._copied() for width in widths}
        self._chunks = _chunks(shards)

    def _copied(self) -> dict[str, Tensor]:
        """The masters by name, as views of one tensor."""
        sizes = [len(shard.master) for shard in self._shards]
        device = next(iter(self._shards)).master.device
        flat = self._memory.empty(sum(sizes), device)
        track = {shard.name: view for shard, view in zip(self._shards, flat.split(sizes), strict=True)}
        for shard in self._shards:
            track[shard.name].copy_(shard.master)
            self._memory.relieve(track[shard.name].nbytes)
        return track

    @property
    def widths(self) -> tuple[float, ...]:
        return tuple(self._tracks)

    @torch.no_grad()
    def update(self, images_before: int, images_after: int) -> None:
        """Follow an applied optimizer step that took the count of images from one value to the other."""
        for width, track in self._tracks.items():
            new = 1 - power_ema.decay(images_before, images_after, self._gammas[width])
            for some in self._chunks:
                own = [track[shard.name] for shard in some]
                torch._foreach_lerp_(own, [shard.master.to(own[0].device) for shard in some], new)
                self._memory.relieve(sum(values.nbytes for values in own))

    def gather(self, width: float) -> Iterator[tuple[str, Tensor]]:
        """(name, whole track on the CPU), one parameter after the other, on rank 0; nothing elsewhere.

        Every rank has to exhaust it, since all take part.
        """
        for shard in self._shards:
            own = self._tracks[width][shard.name]
            whole = _gather(shard, own.to(shard.master.device))
            self._memory.relieve(own.nbytes)
            if whole is not None:
                yield shard.name, whole

    def pieces(self) -> dict[str, Piece]:
        """The tracks as this rank holds them, by `ema-WIDTH/NAME`."""
        return {
            f"{_kind(width)}/{shard.name}": Piece(track[shard.name], shard.shape, shard.start)
            for width, track in self._tracks.items()
            for shard in self._shards
        }

    def load(self, key: str, values: Tensor) -> None:
        """Overwrite one parameter's track; its key is that of `pieces`."""
        kind, _, name = key.partition("/")
        track = next(track for width, track in self._tracks.items() if _kind(width) == kind)
        track[name].copy_(values)

    def refresh(self) -> None:
        """Nothing else holds the tracks."""


def _chunks(shards: Iterable[Shard], most: int = 2**26) -> list[list[Shard]]:
    """Shards of about `most` elements together: many per call, few pages of a disk at once."""
    chunks, numel = [[]], 0
    for shard in shards:
        if numel > most:
            chunks.append([])
            numel = 0
        chunks[-1].append(shard)
        numel += shard.stop - shard.start
    return chunks


def _kind(width: float) -> str:
    return f"ema-{width}"


def _gather(shard: Shard, local: Tensor) -> Tensor | None:
    """The whole tensor on rank 0, None elsewhere."""
    world, size = dist.get_world_size(), -(-shard.numel // dist.get_world_size())
    padded = local if len(local) == size else torch.cat([local, local.new_zeros(size - len(local))])
    whole = local.new_empty(world * size) if dist.get_rank() == 0 else None
    dist.gather(padded, None if whole is None else list(whole.split(size)), dst=0)
    return None if whole is None else whole[: shard.numel].view(shard.shape).cpu()
