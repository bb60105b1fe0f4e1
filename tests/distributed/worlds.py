"""Runs a program as one world of gloo ranks on this machine and returns what each rank reported.

A program is a plain file under `programs/`, run by path; it joins with `rank.join()` and reports with `rank.report`:

    results = run_world(PROGRAMS / "zero_state.py", 2, "save", str(folder))
    assert results[0]["loss"] == results[1]["loss"]
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")


@dataclass(frozen=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    report: Path
    log: Path

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> dict[str, Any]:
        return json.loads(self.report.read_text()) if self.report.exists() else {}


def run_world(
    program: Path, world: int, *args: str, timeout: float = 120.0, may_die: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Run `program` with `args` on each of `world` ranks, and return their reports by rank.

    After `timeout` seconds all are killed. Ranks in `may_die` are expected to end badly; without a report theirs is
    empty. If another one fails or the time is over, an AssertionError shows the end of every rank's output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        port = _free_port()
        ranks = [_start(program, args, number, world, port, Path(scratch)) for number in range(world)]
        try:
            _wait(ranks, timeout, may_die)
        finally:
            for rank in ranks:
                rank.kill()
        return [rank.result() for rank in ranks]


def _start(program: Path, args: Collection[str], number: int, world: int, port: int, scratch: Path) -> _Rank:
    report, log = scratch / f"report-{number}.json", scratch / f"log-{number}.txt"
    environment = {
        **os.environ,
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
        **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        **{"PYTHONPATH": str(ROOT), "WORLD_REPORT": str(report)},
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, program, *args],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Rank(number, process, report, log)


def _wait(ranks: list[_Rank], timeout: float, may_die: Collection[int]) -> None:
    deadline = time.monotonic() + timeout
    while any(rank.process.poll() is None for rank in ranks):
        failed = [rank.number for rank in ranks if rank.process.poll() and rank.number not in may_die]
        assert not failed, f"rank {failed[0]} failed\n{_logs(ranks)}"
        assert time.monotonic() < deadline, f"not finished within {timeout:g} s\n{_logs(ranks)}"
        time.sleep(0.05)
    failed = [rank.number for rank in ranks if rank.process.returncode and rank.number not in may_die]
    assert not failed, f"rank {failed[0]} failed\n{_logs(ranks)}"


def _logs(ranks: list[_Rank]) -> str:
    return "\n".join(f"--- rank {rank.number}\n{rank.log.read_text(errors='replace')[-4000:]}" for rank in ranks)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
