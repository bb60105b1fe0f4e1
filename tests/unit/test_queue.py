"""Claims: one winner among rivals, take-over of the dead, and no result from the overtaken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sctrain.evaluation.queue import Claim, OvertakenError, claim, is_done, read_result

LONG = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "evaluations" / "000000000128"


def age(mine: Claim, seconds: float) -> None:
    """Let the last heartbeat lie `seconds` back."""
    then = time.time() - seconds
    os.utime(mine.path, (then, then))


def claimed(folder: Path) -> Claim:
    mine = claim(folder, LONG)
    assert mine is not None
    return mine


def test_second_claim_is_refused_while_the_first_lives(folder: Path):
    mine = claimed(folder)
    about = json.loads(mine.path.read_text())
    assert about["pid"] == os.getpid() and about.keys() == {"token", "host", "pid", "time"}
    assert claim(folder, LONG) is None


def test_result_ends_all_claims(folder: Path):
    claimed(folder).publish({"lines": [1]})
    assert is_done(folder) and read_result(folder) == {"lines": [1]}
    assert claim(folder, LONG) is None


def test_overtaken_worker_discards_its_result(folder: Path):
    slow = claimed(folder)
    age(slow, 2 * LONG)
    quick = claimed(folder)
    with pytest.raises(OvertakenError, match=r"000000000128 was taken over by another worker; .* discarded"):
        slow.publish({"by": "slow"})
    quick.publish({"by": "quick"})
    with pytest.raises(OvertakenError):
        slow.publish({"by": "slow"})
    assert read_result(folder) == {"by": "quick"}


def test_result_published_first_stands_even_between_check_and_creation(folder: Path, monkeypatch):
    slow = claimed(folder)
    age(slow, 2 * LONG)
    claimed(folder).publish({"by": "quick"})
    monkeypatch.setattr(Claim, "check", lambda self: None)  # the check came just before the take-over
    with pytest.raises(OvertakenError):
        slow.publish({"by": "slow"})
    assert read_result(folder) == {"by": "quick"}


def test_heartbeat_keeps_a_claim_and_leaving_gives_it_back(folder: Path):
    mine = claimed(folder)
    with mine.kept(claim_seconds=0.2):
        age(mine, 100)
        time.sleep(0.2)  # a beat is due every 0.05 s
        assert claim(folder, 10.0) is None
        mine.check()
    claimed(folder)
    with pytest.raises(OvertakenError):
        mine.check()


def rival(start: float, folders: list[Path]) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("queue_rival.py")), str(start), *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_claim_of_a_dead_process_on_this_machine_is_free_at_once(folder: Path):
    assert rival(0, [folder]).communicate()[0].split() == [folder.name]
    assert claimed(folder).generation == 2


def test_of_many_rivals_exactly_one_wins_each_round(tmp_path: Path):
    """Three processes of three threads rush at fresh claims, and then at stale ones."""
    folders = [tmp_path / str(i) for i in range(40)]
    for generation in (1, 2):
        rivals = [rival(time.time() + 0.5, folders) for _ in range(3)]
        won = [process.stdout.readline().split() for process in rivals if process.stdout]  # all have tried everything
        for process in rivals:
            process.communicate()
        assert sorted(name for names in won for name in names) == sorted(folder.name for folder in folders)
        for folder in folders:
            assert len(list(folder.glob("claim-*.json"))) == generation
            age(Claim(folder, generation), 2 * LONG)
