"""A few threads that begin with the first task and never keep a process from ending, as an executor's would."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool:
    """At most `size` calls at once, whichever threads ask for them."""

    def __init__(self, size: int):
        self._size = size
        self._tasks: queue.SimpleQueue[tuple[Future, Callable, object] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._growing = threading.Lock()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """The results in order; the first error, after what has not begun was called off."""
        futures: list[Future] = []
        for task in tasks:
            futures.append(Future())
            self._tasks.put((futures[-1], function, task))
        self._grow()
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self, patience_s: float) -> None:
        """Let the threads end after what they were given, and wait for that up to `patience_s` seconds."""
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))

    def _grow(self) -> None:
        with self._growing:
            for _ in range(min(self._tasks.qsize(), self._size - len(self._threads))):
                self._threads.append(threading.Thread(target=self._work, daemon=True, name="storage"))
                self._threads[-1].start()

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            future, function, task = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(task))
                except BaseException as error:
                    future.set_exception(error)
