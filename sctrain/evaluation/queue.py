"""Who evaluates which snapshot, settled by exclusive creation of files in a folder that processes and machines share.

    evaluations/<images>/claim-0001.json   {"token", "host", "pid", "time"}; its mtime is the heartbeat
    evaluations/<images>/metrics.json      the result; where it exists, the work is done

A claim without a heartbeat is taken over by creating the next generation: the highest number holds the claim, of
several rivals exactly one succeeds, and nothing is ever deleted under a living worker's hands. A worker that was
overtaken notices the higher number. Ages compare two times of the file system's own clock, so the machines' clocks
need not agree.
"""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctrain.files import create_json

RESULT = "metrics.json"


class OvertakenError(Exception):
    """The claim was taken over by another worker; the result of this one is not wanted."""


@dataclass(frozen=True)
class Claim:
    """The right to evaluate one snapshot, for as long as nobody overtakes it."""

    folder: Path
    generation: int

    @property
    def path(self) -> Path:
        return _claim_path(self.folder, self.generation)

    def check(self) -> None:
        """OvertakenError if another worker took the claim over."""
        if _newest(self.folder) != self.generation:
            raise OvertakenError(self._overtaken())

    def publish(self, result: dict[str, Any]) -> None:
        """Make `result` the result of this snapshot. OvertakenError if another worker holds the claim or was faster."""
        self.check()
        if not create_json(self.folder / RESULT, result):
            raise OvertakenError(self._overtaken())

    @contextmanager
    def kept(self, claim_seconds: float) -> Iterator[None]:
        """Beat inside the block; leaving it without a result gives the claim back."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop, claim_seconds / 4), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.release()

    def release(self) -> None:
        """Let the next worker take over at once."""
        self._touch((0, 0))

    def _beat(self, stop: threading.Event, every: float) -> None:
        while not stop.wait(every):
            self._touch(None)

    def _touch(self, times: tuple[int, int] | None) -> None:
        try:
            os.utime(self.path, times)
        except FileNotFoundError:  # the folder was removed: `check` says so
            pass

    def _overtaken(self) -> str:
        return f"{self.folder} was taken over by another worker; this worker's result is discarded"


def claim(folder: Path, claim_seconds: float) -> Claim | None:
    """The claim on `folder`, or None where the work is done or another worker is at it."""
    if is_done(folder):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    generation = _newest(folder)
    if generation and not _abandoned(_claim_path(folder, generation), claim_seconds):
        return None
    mine = Claim(folder, generation + 1)
    about = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    if not create_json(mine.path, about):
        return None
    # A claim that began before another worker's result appeared finds it now.
    return None if is_done(folder) else mine


def is_done(folder: Path) -> bool:
    return (folder / RESULT).is_file()


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text())


def _newest(folder: Path) -> int:
    """The highest generation, 0 where there is none."""
    return max((int(path.stem.removeprefix("claim-")) for path in folder.glob("claim-*.json")), default=0)


def _claim_path(folder: Path, generation: int) -> Path:
    return folder / f"claim-{generation:04d}.json"


def _abandoned(path: Path, claim_seconds: float) -> bool:
    """Whether the holder is dead (known on its own machine only), or has not beaten for `claim_seconds`."""
    with tempfile.TemporaryFile(dir=path.parent) as file:  # touched now: the file system's own clock
        age = os.fstat(file.fileno()).st_mtime - path.stat().st_mtime
    holder = json.loads(path.read_text())
    return age > claim_seconds or (holder["host"] == socket.gethostname() and not _alive(holder["pid"]))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True
