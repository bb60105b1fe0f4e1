"""Progress on stderr: a bar where a person watches, one line per status interval where nobody does."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TextIO

import psutil
import torch
from tqdm import tqdm


def say(sentence: str) -> None:
    """One line for people, on stderr, above a bar if there is one."""
    tqdm.write(sentence, file=sys.stderr)


class StatusLine:
    """How far a run is, how fast, and how long it still takes."""

    def __init__(self, total: int, start: int = 0, *, enabled: bool = True, stream: TextIO | None = None):
        """`start` of `total` images are done already (a resumed run). All ranks measure, the `enabled` one shows."""
        self._total, self._enabled, self._stream = total, enabled, stream or sys.stderr
        self._images, self._waited, self._time = start, 0.0, time.perf_counter()
        self._bar = self._new_bar() if enabled and self._stream.isatty() else None

    def _new_bar(self) -> tqdm:
        return tqdm(total=self._total, initial=self._images, unit="img", unit_scale=True, file=self._stream)

    def update(self, images: int, *, loss: float, wait_seconds: float) -> dict[str, float]:
        """Show the state after `images`; `wait_seconds` is how long the run has waited for data, all in all.

        Returns what was measured since the last call: `speed/images_per_second`, `speed/data_wait` (a share of the
        time, in [0, 1]) and `speed/memory_gib`.
        """
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        rate, wait = (images - self._images) / elapsed, (wait_seconds - self._waited) / elapsed
        memory = memory_bytes() / 2**30
        self._images, self._waited, self._time = images, wait_seconds, now
        if self._enabled:
            self._show(rate, f"loss {loss:.4g}  data wait {wait:.1%}  memory {memory:.1f} GiB")
        return {"speed/images_per_second": rate, "speed/data_wait": wait, "speed/memory_gib": memory}

    def _show(self, rate: float, details: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(details, refresh=False)
            self._bar.update(self._images - self._bar.n)
            return
        done = f"{self._images:,}/{self._total:,} img ({self._images / self._total:.1%})"
        eta = timedelta(seconds=round((self._total - self._images) / rate)) if rate > 0 else "unknown"
        print(f"{done}  {rate:,.0f} img/s  eta {eta}  {details}", file=self._stream, flush=True)

    def say(self, sentence: str) -> None:
        """As the function `say`, from the rank that shows."""
        if self._enabled:
            say(sentence)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()


def memory_bytes() -> int:
    """The most that CUDA tensors took so far, or the resident memory of this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
