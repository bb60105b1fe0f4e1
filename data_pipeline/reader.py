"""Positions of the endless sequence -> a batch, the same on whichever rank and worker it is made.

All that is random about a sample (flip, latent noise, what replaces a damaged one) is keyed by (seed, position).
"""

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from data_pipeline import storage
from data_pipeline.dataset import ShardedDataset, as_tensor
from data_pipeline.errors import DamagedError, DataError, MissingError
from data_pipeline.fetch import Fetched, Fetcher
from data_pipeline.order import SampleOrder, random_bits

FLIP, LATENT_NOISE, REPLACEMENT = 16, 17, 18  # purposes of the random streams of a position
REPLACEMENTS_TRIED = 16


@dataclass(frozen=True)
class ReadOptions:
    """What is done to samples, and with those that cannot be read."""

    flip: bool = False  # mirror half of the images
    max_corrupt_share: float = 0.001  # of the samples read: replace up to so many, then stop
    on_lost_shard: Literal["stop", "replace"] = "stop"


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank."""

    images: torch.Tensor  # (B, C, H, W) uint8; or latents, of their own type
    labels: torch.Tensor  # (B,) int64
    positions: torch.Tensor  # (B,) int64: places in the endless global sequence, the key of all per-sample randomness
    sample_ids: torch.Tensor  # (B,) int64: rows of the index
    # Since the last batch of this process: bytes, requests and retries of its store, cache_hits, ..., decode_seconds.
    statistics: dict[str, float] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()  # about each sample that had to be replaced, one sentence

    def __getstate__(self) -> dict[str, Any]:
        """Between processes every tensor travels by a handle that costs a handshake: too much for a few numbers."""
        return self.__dict__ | {name: self.__dict__[name].numpy() for name in _NUMBERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {name: torch.from_numpy(state[name]) for name in _NUMBERS})

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory (torch's DataLoader calls this by name)."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in ("images", *_NUMBERS)})


_NUMBERS = ("labels", "positions", "sample_ids")  # of a Batch, per sample


@dataclass(frozen=True)
class LookAhead:
    """The later batches of one process: `count` of them, `stride` positions apart."""

    stride: int
    count: int


class Reader(Dataset):
    """Positions (B,) -> a batch, or the error that reading them gave (torch would rewrite it across processes)."""

    def __init__(
        self, dataset: ShardedDataset, seed: int, window: int, options: ReadOptions, ahead: LookAhead, *, spans: bool
    ):
        self._dataset, self._seed, self._options = dataset, seed, options
        self._order = SampleOrder(dataset.index, seed, window)
        self._ahead, self._spans = ahead, spans
        self._is_first = True

    def __getitem__(self, positions: np.ndarray) -> Batch | DataError:
        try:
            return self._batch(positions)
        except DataError as error:
            return error

    def fetch(self, positions: np.ndarray) -> tuple[np.ndarray, list[Fetched]]:
        """Sample ids (B,), and the bytes of the samples or why they are lost; later batches are begun with before."""
        ids = self._order.sample_ids(positions)
        self._look_ahead(positions, ids)
        return ids, self._fetcher.read(ids)

    def close(self) -> None:
        """End what this process began."""
        if "_fetcher" in self.__dict__:
            self._fetcher.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_fetcher", "_reported")}

    @cached_property
    def _fetcher(self) -> Fetcher:
        return self._dataset.fetcher(spans=self._spans)

    @cached_property
    def _reported(self) -> dict[str, float]:
        """The counts of this process that batches told so far."""
        return self._counts()

    def _counts(self) -> dict[str, float]:
        return {**storage.statistics(), **self._fetcher.counts}

    def _batch(self, positions: np.ndarray) -> Batch:
        assert self._reported is not None  # begins to count
        ids, fetched = self.fetch(positions)
        start = time.perf_counter()
        stored, problems = self._dataset.decode(ids, fetched, self._fetcher)
        about = tuple(self._dataset.named(int(ids[row]), problem) for row, problem in problems.items())
        for row, problem in problems.items():
            ids[row], stored[row] = self._replacement(int(positions[row]), problem)
        images = self._finished(stored, positions)
        statistics = self._since_last() | {
            "decode_seconds": time.perf_counter() - start,
            "samples": len(ids),
            "replaced": len(problems),
        }
        labels = self._dataset.labels(ids)
        return Batch(images, labels, torch.from_numpy(positions), torch.from_numpy(ids), statistics, about)

    def _look_ahead(self, positions: np.ndarray, ids: np.ndarray) -> None:
        """Let the fetcher begin with what this process will read; with the first batch, before all that."""
        first = 1 if self._is_first else self._ahead.count
        if self._is_first and self._ahead.count:
            self._fetcher.ahead(ids)
        self._is_first = False
        for turn in range(first, self._ahead.count + 1) if self._ahead.count else ():
            self._fetcher.ahead(self._order.sample_ids(positions + turn * self._ahead.stride))

    def _since_last(self) -> dict[str, float]:
        now = self._counts()
        new = {name: value - self._reported.get(name, 0) for name, value in now.items()}
        self.__dict__["_reported"] = now
        return new

    def _replacement(self, position: int, problem: DamagedError | MissingError) -> tuple[int, np.ndarray]:
        """The first of the samples drawn for this position that can be read; the problem itself if it may not be."""
        if isinstance(problem, MissingError) and self._options.on_lost_shard == "stop":
            raise problem
        bits = random_bits(self._seed, position, REPLACEMENT)
        for drawn in bits.random_raw(REPLACEMENTS_TRIED).tolist():
            sample_id = np.array([drawn % len(self._dataset)])
            fetched = self._fetcher.read(sample_id)
            stored, problems = self._dataset.decode(sample_id, fetched, self._fetcher)
            if not problems:
                return int(sample_id[0]), stored[0]
        raise problem

    def _finished(self, stored: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Images or latents out of what is stored (B, ...)."""
        about = self._dataset.description
        if self._options.flip:
            for row, position in enumerate(positions.tolist()):
                if random_bits(self._seed, position, FLIP).random_raw() >> 63:
                    stored[row] = stored[row, :, :, ::-1].copy()
        if about.latents is None or about.latents.content == "mean":
            return as_tensor(stored, about)
        noise = np.stack([self._noise(position, about.shape) for position in positions.tolist()])
        return as_tensor(stored, about, noise)

    def _noise(self, position: int, shape: tuple[int, int, int]) -> np.ndarray:
        bits = random_bits(self._seed, position, LATENT_NOISE)
        return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
