"""Peak bytes of live tensors, and collectives, of one run. Resident memory hides them behind imports and caches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.tangent.dual import Dual


@dataclass(frozen=True)
class Footprint:
    """Of one run: peak bytes above what was there before, and all-gathers (None on a GPU, which hides its own)."""

    peak_bytes: int
    gathers: int | None


def footprint(run: Callable[[], object]) -> Footprint:
    """Run once and look. On a CPU every operation is watched, so the run is slow."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return Footprint(torch.cuda.max_memory_allocated() - before, None)
    with Watch() as watch:
        run()
    return Footprint(watch.peak, watch.gathers)


def live_bytes() -> int:
    """Of all tensors that this process holds, on a CPU, each storage once."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not isinstance(x, Dual)]
    storages = {s._cdata: s.nbytes() for s in _storages([(x, x.grad if x.is_leaf else None) for x in tensors])}
    return sum(storages.values())


class Watch(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.gathers, self._live = 0, 0, 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views of the old make nothing new
        out = func(*args, **(kwargs or {}))
        self.gathers += "allgather" in func.name()
        for storage in _storages(out):
            if storage._cdata not in given:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live -= self._bytes.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == "cpu"]
