"""Randomness that belongs to samples, not to processes.

Each sample draws from a Philox stream keyed by (seed, position in the endless sequence of samples). So noise, times
and label dropout are the same for any number of ranks, workers and restarts, and for any split of a batch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class Purpose(enum.IntEnum):
    """Independent streams under one seed."""

    TRAINING = 0
    INITIAL_NOISE = 1
    FRESH_NOISE = 2
    BATCH = 3
    AUGMENTATION = 4


class SampleGenerator:
    """Draws for a batch of samples at the given positions; successive draws of a sample continue its own stream."""

    def __init__(
        self, seed: int, positions: Iterable[int] | Tensor, purpose: Purpose, device: torch.device | str = "cpu"
    ):
        self._seed, self._device = seed, device
        self._positions = [int(p) for p in (positions.tolist() if isinstance(positions, Tensor) else positions)]
        self._streams = [_stream(seed, position, purpose) for position in self._positions]

    def of(self, purpose: Purpose, device: torch.device | str) -> SampleGenerator:
        """Other draws of the same samples, from the start of their own streams; these here notice nothing."""
        return SampleGenerator(self._seed, self._positions, purpose, device)

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal float32 (B, *shape)."""
        return self._stack(lambda stream: stream.standard_normal(shape, dtype=np.float32))

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), float32 (B,)."""
        return self._stack(lambda stream: stream.random(dtype=np.float32))

    def of_batch(self, number: int) -> float:
        """Uniform on [0, 1), of the whole batch with this number (its position, say): the same on all ranks."""
        return _stream(self._seed, number, Purpose.BATCH).random()

    def _stack(self, draw: Callable) -> Tensor:
        # Of one number numpy makes a double.
        values = [np.asarray(draw(stream), np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(values)).to(self._device)


def _stream(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    # The purpose is the highest word of the counter: no stream is long enough to run into the next.
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, position % 2**64], counter=[0, 0, 0, int(purpose)]))
