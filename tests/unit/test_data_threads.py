"""The threads that fetch: results, errors, and an end."""

import gc
import threading
import time
from concurrent.futures import Future

import pytest

from data_pipeline.threads import THREADS, DaemonThreads


def running() -> int:
    return sum(thread.name == "data-fetch" for thread in threading.enumerate())


def until_ended(before: int) -> None:
    deadline = time.monotonic() + 10
    while running() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Holder:
    """As a fetcher does, it hands its own methods to its threads."""

    def __init__(self):
        self.threads = DaemonThreads()

    def ask(self, value: float) -> Future:
        future: Future = Future()
        self.threads.start(future, self.inverse, value)
        return future

    def inverse(self, value: float) -> float:
        return 1 / value


def test_results_errors_and_an_end_with_their_holder():
    before = running()
    holder = Holder()
    futures = [holder.ask(value) for value in range(1, 40)]
    assert [future.result() for future in futures] == [1 / value for value in range(1, 40)]
    with pytest.raises(ZeroDivisionError):
        holder.ask(0).result()
    assert running() == before + THREADS
    del holder, futures
    gc.collect()
    until_ended(before)


def test_closing_leaves_what_has_not_begun_and_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_pipeline.threads.END_SECONDS", 0.1)
    before, threads, gate = running(), DaemonThreads(), threading.Event()
    futures = [Future() for _ in range(THREADS + 5)]
    for future in futures:
        threads.start(future, gate.wait)
    start = time.monotonic()
    threads.close()
    assert time.monotonic() - start < 5
    gate.set()
    until_ended(before)
    assert sum(future.done() for future in futures) <= THREADS
