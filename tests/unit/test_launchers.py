"""Local ranks as real, tiny processes: environment, exit codes, signals, and what is left when something is killed."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import local
from launchers.local import run_ranks, start

ROOT = Path(__file__).parents[2]
LAUNCHER = (
    "import sys; from launchers.local import run_ranks; import os; sys.exit(run_ranks(sys.argv[1:], 2, os.environ))"
)
# A rank that answers one signal as the trainer does, with a helper process that must not get it.
SAVING = """
import os, pathlib, signal, subprocess, sys
helper = subprocess.Popen(["sleep", "20"])
def save(number, _):
    alive = helper.poll() is None
    helper.kill()
    pathlib.Path(f"saved{os.environ['RANK']}").write_text(f"{signal.Signals(number).name} {alive}")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, save)
pathlib.Path(f"ready{os.environ['RANK']}").write_text(f"{os.getpid()} ")
while True:
    signal.pause()
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_rank_gets_its_place():
    program = "import os, json, pathlib; pathlib.Path(os.environ['RANK']).write_text(json.dumps(dict(os.environ)))"
    assert run_ranks(python(program), 3, {"KEPT": "yes"}) == 0
    seen = [json.loads(Path(str(rank)).read_text()) for rank in range(3)]
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in seen] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) for env in seen} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({env["MASTER_PORT"] for env in seen}) == 1
    assert {env["KEPT"] for env in seen} == {"yes"}
    assert {int(env["OMP_NUM_THREADS"]) for env in seen} == {max(1, len(os.sched_getaffinity(0)) // 3)}


def test_threads_that_are_set_stay():
    program = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '7')"
    assert run_ranks(python(program), 2, {"OMP_NUM_THREADS": "7"}) == 0


@pytest.mark.parametrize(
    ("last_words", "code"),
    [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137), ("raise SystemExit('a defect')", 1)],
)
def test_the_exit_code_is_that_of_the_rank_that_died(last_words: str, code: int, capsys: pytest.CaptureFixture[str]):
    """Its peer would wait for it for ever, and is asked to leave."""
    program = f"import os, sys, time\nif os.environ['RANK'] == '1': {last_words}\ntime.sleep(60)"
    start = time.monotonic()
    assert run_ranks(python(program), 2, {}) == code
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == ("rank 1 was killed by SIGKILL; its peers are ended\n" if code == 137 else "")


def test_a_peer_that_does_not_leave_is_killed_with_its_helpers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
    program = """
import os, pathlib, signal, subprocess, sys, time
if os.environ["RANK"] == "0":
    while not pathlib.Path("stubborn").exists(): time.sleep(0.01)
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen(["sleep", "60"])
pathlib.Path("new").write_text(f"{os.getpid()} {helper.pid}")
os.replace("new", "stubborn")
time.sleep(60)
"""
    assert run_ranks(python(program), 2, {}) == 3
    for pid in Path("stubborn").read_text().split():
        assert_ends(int(pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_but_not_their_helpers(number: signal.Signals):
    launcher = start_launcher()
    launcher.send_signal(number)
    assert launcher.wait(30) == 75
    assert [Path(f"saved{rank}").read_text() for rank in range(2)] == [f"{number.name} True"] * 2


def test_ranks_die_with_a_killed_launcher():
    launcher = start_launcher()
    ranks = [int(Path(f"ready{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.wait(30)
    for pid in ranks:
        assert_ends(pid)


def start_launcher() -> subprocess.Popen[bytes]:
    """A launcher of two saving ranks, once both are ready."""
    command = [*python(LAUNCHER), *python(SAVING)]
    launcher = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for rank in range(2):
        wait_until(lambda rank=rank: Path(f"ready{rank}").exists() and Path(f"ready{rank}").read_text().endswith(" "))
    return launcher


def assert_ends(pid: int) -> None:
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    """Zombies, which wait for a parent to notice, have ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_background_process_yields_within_and_between_sessions(tmp_path: Path):
    program = (
        "import os, pathlib, sys; own_session = os.getsid(0) == os.getpid();"
        "group = pathlib.Path('/proc/self/autogroup');"
        "said = [os.getpriority(os.PRIO_PROCESS, 0), own_session, group.read_text() if group.exists() else 'nice 19'];"
        "pathlib.Path(sys.argv[1]).write_text(repr(said))"
    )
    start([sys.executable, "-c", program, str(tmp_path / "said")], os.environ, background=True).wait()
    niceness, own_session, group = ast.literal_eval((tmp_path / "said").read_text())
    assert (niceness, own_session) == (19, True) and group.strip().endswith("nice 19")
