"""One of several processes on one cache. Arguments: folder, what to do, then what that needs.

read SPANS SEED LOG: read all spans in a random order, noting in LOG which were loaded here.
hang-loading | hang-writing SPAN: stop in the middle of filling, after saying so.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.cache import CacheOptions, SpanCache

SIZE = 200_000


def content(span: int) -> bytes:
    return random.Random(span).randbytes(SIZE)


def main(folder: str, action: str, *arguments: str) -> None:
    cache = SpanCache(CacheOptions(folder, 2**30), "abc")
    if action == "read":
        spans, seed, log = int(arguments[0]), int(arguments[1]), Path(arguments[2])
        read(cache, random.Random(seed).sample(range(spans), spans), log)
    else:
        span = int(arguments[0])
        write = os.write

        def half_a_write(descriptor: int, data: memoryview) -> int:
            write(descriptor, data[: SIZE // 2])
            return hang()

        if action == "hang-writing":
            os.write = half_a_write
        cache.fill(span, SIZE, (lambda: [content(span)]) if action == "hang-writing" else hang)


def hang() -> Any:
    print("hanging", flush=True)
    time.sleep(60)


def read(cache: SpanCache, spans: list[int], log: Path) -> None:
    for span in spans:

        def load(span: int = span) -> Iterator[bytes]:
            with log.open("a") as file:
                file.write(f"{span}\n")
            time.sleep(0.01)
            yield content(span)[:1000]
            yield content(span)[1000:]

        assert cache.fill(span, SIZE, load)
        assert cache.read(span, [(0, SIZE)]) == [content(span)]


if __name__ == "__main__":
    main(*sys.argv[1:])
