"""Reading a whole data set again: every byte range, its checksum, its image and its place in the index."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.description import read_description
from data_pipeline.errors import PREPARE_AGAIN, DataError
from data_pipeline.parallel import ordered
from data_pipeline.shards import Progress, quiet

RUN = 32  # samples per message to a process
MOST_NAMED = 10


@dataclass(frozen=True)
class Verdict:
    """What was read, and what is wrong with it."""

    samples: int
    bytes: int
    damaged: list[str]  # one sentence each

    def require_sound(self, url: str) -> None:
        """DataError that names the first damaged samples, if there are any."""
        if self.damaged:
            first = "; ".join(self.damaged[:MOST_NAMED])
            more = f"; and {len(self.damaged) - MOST_NAMED} more" if len(self.damaged) > MOST_NAMED else ""
            raise DataError(
                f"{url}: {len(self.damaged)} of {self.samples:,} samples are damaged ({first}{more}): {PREPARE_AGAIN}."
            )


def verify_dataset(url: str, processes: int = 1, progress: Progress = quiet) -> Verdict:
    """Read every sample of every split of the data set `url`; DataError if it is no data set at all."""
    samples, total_bytes, damaged = 0, 0, []
    for split in read_description(url).splits:
        dataset = open_dataset(url, split)
        damaged += _gaps(dataset)
        bar = progress(f"verify {split}", len(dataset), 0)
        runs = [range(start, min(start + RUN, len(dataset))) for start in range(0, len(dataset), RUN)]
        for run, found in zip(runs, ordered(_Checker(dataset), runs, processes), strict=True):
            damaged += found
            bar.update(len(run))
        bar.close()
        samples += len(dataset)
        total_bytes += int(dataset.index.size.sum(dtype=np.int64))
    return Verdict(samples, total_bytes, damaged)


@dataclass(frozen=True, eq=False)
class _Checker:
    """Sample ids -> a sentence for each that is damaged."""

    dataset: ShardedDataset

    def __call__(self, run: range) -> list[str]:
        """Together, which a store answers faster; one by one where something is wrong, to name each."""
        try:
            self.dataset.read(np.array(run))
        except DataError:
            return [sentence for sample_id in run if (sentence := self._problem(sample_id))]
        return []

    def _problem(self, sample_id: int) -> str | None:
        try:
            self.dataset.read(np.array([sample_id]))
        except DataError as error:
            return str(error).removesuffix(f": {PREPARE_AGAIN}.")
        return None


def _gaps(dataset: ShardedDataset) -> list[str]:
    """Shards with bytes between their samples, which plain webdataset would read as samples too."""
    index = dataset.index
    follows = np.ones(len(index), bool)
    first = np.flatnonzero(np.diff(index.shard, prepend=-1))
    follows[first] = index.offset[first] == 0
    rest = np.setdiff1d(np.arange(len(index)), first)
    follows[rest] = index.offset[rest] == index.offset[rest - 1] + index.size[rest - 1]
    return [
        f"{index.shard_name(sample_id)} has something before sample {index.key[sample_id].decode('ascii', 'replace')!r}"
        for sample_id in np.flatnonzero(~follows).tolist()
    ]
