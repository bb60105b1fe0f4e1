"""Threads for requests to a store."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeAlias, TypeVar

THREADS = 8  # per user of them
END_SECONDS = 2.0

Task = TypeVar("Task")
Result = TypeVar("Result")
_Tasks: TypeAlias = "queue.SimpleQueue[tuple[Future, Callable, tuple] | None]"


class DaemonThreads:
    """At most `size` threads that begin with the first task, and end with whoever holds this or with `close`.

    They never keep a process from ending, as an executor's would. Any thread may ask for them.
    """

    def __init__(self, size: int = THREADS):
        self._size = size
        self._tasks: _Tasks = queue.SimpleQueue()
        self._running: list[threading.Thread] = []
        self._growing = threading.Lock()
        self._closed = threading.Event()

    def start(self, future: Future, function: Callable, *arguments: object) -> None:
        """Let `future` become what the function gives or raises."""
        self._tasks.put((future, function, arguments))
        with self._growing:
            if len(self._running) < self._size:
                work = (self._tasks, self._closed)  # not self, which could then never be forgotten
                self._running.append(threading.Thread(target=_work, args=work, daemon=True, name="data-fetch"))
                self._running[-1].start()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """The results in order; the first error, after what has not begun was called off."""
        futures: list[Future] = []
        for task in tasks:
            futures.append(Future())
            self.start(futures[-1], function, task)
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self, *, finish: bool = False) -> None:
        """Leave what has not begun, or `finish` it too. Waits but briefly: a request may have a long patience."""
        self._end(finish=finish)
        until = time.monotonic() + END_SECONDS
        for thread in self._running:
            thread.join(max(until - time.monotonic(), 0))
        self._running.clear()

    def _end(self, *, finish: bool) -> None:
        if not finish:
            self._closed.set()
        for _ in self._running:
            self._tasks.put(None)

    def __del__(self):
        self._end(finish=False)


def _work(tasks: _Tasks, closed: threading.Event) -> None:
    while (task := tasks.get()) is not None and not closed.is_set():
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del task, future, function, arguments  # what a thread remembers while it waits is never forgotten
