"""Threads for requests to a store."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

THREADS = 8  # per user of them
END_SECONDS = 2.0

_Tasks: TypeAlias = "queue.SimpleQueue[tuple[Future, Callable, tuple] | None]"


class DaemonThreads:
    """A few threads that begin with the first task, and end with whoever holds this or with `close`.

    They never keep a process from ending, as an executor's would.
    """

    def __init__(self):
        self._tasks: _Tasks = queue.SimpleQueue()
        self._running: list[threading.Thread] = []
        self._closed = threading.Event()

    def start(self, future: Future, function: Callable, *arguments: object) -> None:
        """Let `future` become what the function gives or raises."""
        self._tasks.put((future, function, arguments))
        if len(self._running) < THREADS:
            work = (self._tasks, self._closed)  # not self, which could then never be forgotten
            self._running.append(threading.Thread(target=_work, args=work, daemon=True, name="data-fetch"))
            self._running[-1].start()

    def close(self) -> None:
        """Leave what has not begun. What has is waited for briefly; a request may have a long patience."""
        self._end()
        until = time.monotonic() + END_SECONDS
        for thread in self._running:
            thread.join(max(until - time.monotonic(), 0))
        self._running.clear()

    def _end(self) -> None:
        self._closed.set()
        for _ in self._running:
            self._tasks.put(None)

    def __del__(self):
        self._end()


def _work(tasks: _Tasks, closed: threading.Event) -> None:
    while (task := tasks.get()) is not None and not closed.is_set():
        future, function, arguments = task
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        del task, future, function, arguments  # what a thread remembers while it waits is never forgotten
