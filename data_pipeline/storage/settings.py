"""How patient reading is, and what it has cost so far."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageSettings:
    """How stores are asked."""

    timeout_s: float = 30.0  # without one byte, after which a request has failed
    retry_budget_s: float = 300.0  # without progress, after which a read has failed
    parallel: int = 32  # requests under way at once, per process

    def __post_init__(self):
        if not (self.timeout_s > 0 and self.retry_budget_s >= 0 and self.parallel >= 1):
            raise ValueError("timeout_s must be above 0, retry_budget_s at least 0 and parallel at least 1")


class Statistics:
    """Counts of one process, for all its threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = {"bytes": 0, "requests": 0, "retries": 0, "seconds": 0.0}

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request and its seconds, successful or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._counts["requests"] += 1
                self._counts["seconds"] += time.perf_counter() - start

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return dict(self._counts)
