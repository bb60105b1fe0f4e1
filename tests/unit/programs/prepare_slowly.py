"""prepare_slowly.py SOURCE DEST PROCESSES: prepares a folder so slowly that it can be killed on the way."""

import sys
import time

from data_pipeline.encoding import Output
from data_pipeline.shards import Bar, Job
from data_pipeline.sources.folder import prepare_folder


class Slow:
    def update(self, n: int, /) -> None:
        time.sleep(0.01)

    def close(self) -> None:
        pass


def slow(split: str, total: int, done: int) -> Bar:
    return Slow()


if __name__ == "__main__":
    source, dest, processes = sys.argv[1:]
    prepare_folder(source, dest, 8, output=Output(samples_per_shard=8), job=Job(int(processes), progress=slow))
