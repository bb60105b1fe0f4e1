"""Several runs trained and scored by the real commands, a few at a time; what is finished is not repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctrain import building
from sctrain.config.loading import dump
from sctrain.config.schema import RunConfig
from sctrain.files import write_text
from sctrain.reporting.console import say
from sctrain.runs import RunFolder

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Trial:
    """One run of a group that differs in the seed alone; `after` is the title of one whose snapshot it starts from."""

    group: str
    config: RunConfig
    after: str | None = None

    @property
    def title(self) -> str:
        return f"{self.group}-{self.config.seed}"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.run_dir)

    def lines(self) -> list[dict[str, Any]]:
        """Scores of its newest snapshot; none before it was scored."""
        lines = self.run.scores()
        return [line for line in lines if line["images"] == lines[-1]["images"]]

    def is_done(self) -> bool:
        """Whether this very run is trained and scored."""
        return bool(self.lines()) and building.is_trained(self.config)

    def beside(self, ending: str) -> Path:
        """A file that belongs to the run, next to its folder."""
        return self.run.root.with_name(f"{self.run.root.name}.{ending}")

    def commands(self) -> Iterator[list[str]]:
        """What trains and scores it."""
        description = self.beside("yaml")
        description.parent.mkdir(parents=True, exist_ok=True)
        write_text(description, dump(self.config))
        yield [sys.executable, "-m", "sctrain", "train", str(description)]
        yield [sys.executable, "-m", "sctrain", "evaluate", str(self.run.root)]


def run_all(trials: Sequence[Trial], jobs: int) -> list[str]:
    """Train and score what is not done, `jobs` at a time; the titles of those that failed, each named when it does.

    A request to stop is passed on to the runs, which save; the same call goes on.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    done = {trial.title for trial in trials if trial.is_done()}
    waiting = deque(trial for trial in trials if trial.title not in done)
    failed: list[str] = []
    running: list[_Job] = []
    if done:
        say(f"{len(done)} of {len(trials)} runs are done already")
    try:
        while waiting or running:
            for trial in [trial for trial in waiting if trial.after in failed]:
                waiting.remove(trial)
                failed.append(trial.title)
                say(f"{trial.title}: not started, for {trial.after} failed")
            for trial in list(waiting):
                if len(running) < jobs and (trial.after is None or trial.after in done):
                    waiting.remove(trial)
                    running.append(_Job(trial))
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                (failed.append if job.code else done.add)(job.trial.title)
                say(f"{job.trial.title}: {job.verdict()} ({len(done)} of {len(trials)} done)")
            time.sleep(_POLL_SECONDS)
    finally:
        for job in running:
            job.ask_to_stop()
        for job in running:
            job.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


class _Job:
    """The commands of one trial, one after the other, with their output in a file beside the run."""

    def __init__(self, trial: Trial):
        self.trial, self.code, self._begin = trial, 0, time.monotonic()
        self._commands = trial.commands()
        self._log = trial.beside("log")
        self._process = self._start(next(self._commands), "wb")

    def _start(self, command: list[str], mode: str) -> subprocess.Popen[bytes]:
        threads = str(self.trial.config.runtime.threads or 1)
        with self._log.open(mode) as log:
            env = {**os.environ, "OMP_NUM_THREADS": threads}
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)

    def ended(self) -> bool:
        """Whether all is done, or a command failed; starts the next command."""
        code = self._process.poll()
        if code is None:
            return False
        following = None if code else next(self._commands, None)
        if following is not None:
            self._process = self._start(following, "ab")
            return False
        self.code = code
        return True

    def verdict(self) -> str:
        seconds = f"{time.monotonic() - self._begin:.0f} s"
        return seconds if self.code == 0 else f"failed with exit code {self.code} after {seconds}: see {self._log}"

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.wait()
