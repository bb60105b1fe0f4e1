"""Ranks of one run as processes of this machine: started together, signalled together, ended together.

Each rank leads a session of its own, so Ctrl-C reaches only the launcher, which passes it on. Should the launcher be
killed itself, the kernel ends the ranks (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED_BY_SIGNAL = 75  # a rank's exit code: it has saved and the same command goes on; its peers are doing the same
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL for the peers of a rank that died
PEER_SECONDS = 2.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def run_ranks(argv: Sequence[str], ranks: int, env: Mapping[str, str]) -> int:
    """Run the program `argv` as `ranks` ranks and wait for them.

    Returns 0 if all succeeded; 75 if they were stopped by a signal and saved; else, after ending the others, the exit
    code of the rank that failed (128 + N where signal N ended it).
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarding(processes):
        try:
            for rank in range(ranks):
                processes.append(start(argv, rank_environment(rank, ranks, port, env)))
            return _wait(processes)
        finally:
            _end(processes)


def rank_environment(rank: int, ranks: int, port: int, env: Mapping[str, str]) -> dict[str, str]:
    """`env` with what torch.distributed reads, for one of `ranks` local ranks that meet at `port`."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return defaults | dict(env) | place


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(argv: Sequence[str], env: Mapping[str, str], *, background: bool = False) -> subprocess.Popen[bytes]:
    """A process in a session of its own that dies with this one; `background` leaves the cores to all others."""
    libc, launcher = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # it died before the request
                os._exit(1)
        if background:
            _step_back()

    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare)


def _step_back() -> None:
    os.nice(19)
    # Linux shares the cores between sessions first, so niceness inside one means nothing to another.
    with suppress(OSError):  # not every kernel groups by session
        Path("/proc/self/autogroup").write_text("19")


@contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass signals on to the ranks themselves, not to their helpers, which have to live until the rank has saved."""

    def forward(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    deadline = None  # 1 is what the peers of a dying rank end with: the rank itself, perhaps a moment later, says more
    while True:
        codes = [process.poll() for process in processes]
        ended = [128 - code if code < 0 else code for code in codes if code is not None]
        failed = [code for code in ended if code not in (0, STOPPED_BY_SIGNAL)]
        if failed and (max(failed) > 1 or time.monotonic() > (deadline := deadline or time.monotonic() + PEER_SECONDS)):
            _name_killed(codes)
            return max(failed)
        if len(ended) == len(processes):
            return max(ended)
        time.sleep(_POLL_SECONDS)


def _name_killed(codes: list[int | None]) -> None:
    """A killed rank cannot speak for itself, and its peers only complain about lost connections."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            print(f"rank {rank} was killed by {signal.Signals(-code).name}; its peers are ended", file=sys.stderr)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask the ranks that still live to leave, then end them with all their helpers."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
