"""Work in other processes with results in order and a bounded number ahead."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from data_pipeline import storage
from data_pipeline.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3  # items per process that are under way or waiting to be taken

_function: Callable[[Any], Any] | None = None  # of a worker process, which serves one function for its whole life


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def ordered(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Generator[Result]:
    """`function(item)` of every item, in order; at most `AHEAD` items per process are ahead of the consumer.

    `function` is sent to each process once, so it may carry large columns. One process means this one. What `function`
    raises is raised here; DataError where the system ended a process.
    """
    if processes == 1:
        yield from map(function, items)
        return
    # spawn: a forked child would inherit threads and clients of object stores, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(function, storage.settings()))
    remaining = iter(items)
    try:
        ahead: deque[Future[Result]] = deque(pool.submit(_call, item) for item in islice(remaining, AHEAD * processes))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(_call, item) for item in islice(remaining, 1))
    except BrokenProcessPool as error:
        raise DataError(
            "the system ended a worker process, most likely for want of memory: repeat with fewer --processes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], settings: storage.StorageSettings) -> None:
    global _function
    _function = function
    storage.configure(settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever: they hold both ends of their queue."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
