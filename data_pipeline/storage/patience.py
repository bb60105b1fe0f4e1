"""When to ask again, and when to give up: exponential backoff with full jitter inside a budget of time."""

import logging
import random
import threading
import time

from data_pipeline.storage.failures import Failure
from data_pipeline.storage.settings import Statistics, StorageSettings
from data_pipeline.storage.urls import shown

FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0
SILENT_S = 5.0  # of trying, before a person is told
_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # the run's own random numbers must not depend on the network


class Patience:
    """The budget of one read. It begins anew whenever something arrived."""

    def __init__(
        self,
        url: str,
        settings: StorageSettings,
        statistics: Statistics,
        stop: threading.Event | None = None,
        *,
        done: str = "read",
    ):
        """`done`: what is tried, as a message says it."""
        self._url, self._done = url, done
        self._budget = settings.retry_budget_s
        self._statistics = statistics
        self._stop = stop or threading.Event()
        self._told = False
        self.progress()

    def progress(self) -> None:
        """Something arrived."""
        self._since = time.monotonic()
        self._failures = self._alike = 0
        self._last: Failure | None = None

    def failed(self, failure: Failure) -> None:
        """Wait until it is worth to ask again; DataError once it is not."""
        self._failures += 1
        self._alike = self._alike + 1 if failure == self._last else 1
        self._last = failure
        tried = time.monotonic() - self._since
        delay = _jitter.uniform(0.5, 1.0) * min(FIRST_DELAY_S * 2 ** min(self._failures - 1, 10), LONGEST_DELAY_S)
        if self._alike >= failure.most or tried + delay > self._budget or self._stop.is_set():
            raise failure.error(self._url, tried, done=self._done)
        if tried > SILENT_S and not self._told:
            self._told = True
            _log.warning("%s: %s; asking again for up to %.0f s", shown(self._url), failure.reason, self._budget)
        self._statistics.add("retries")
        if self._stop.wait(delay):
            raise failure.error(self._url, tried, done=self._done)
