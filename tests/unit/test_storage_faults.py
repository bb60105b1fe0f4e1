"""Reading from a web server that fails: the same bytes, in bounded time; or one sentence once the budget is spent."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from faulty_store import FAULTS, FaultyStore, served

from data_pipeline import storage
from data_pipeline.errors import DataError, MissingError
from data_pipeline.storage import StorageSettings, open_url, patience, read_range, read_ranges, size_of, statistics
from data_pipeline.storage.ranges import PART_BYTES

BIG = random.Random(1).randbytes(PART_BYTES + 3_000_000)
SMALL = random.Random(2).randbytes(100_000)
FAST = StorageSettings(timeout_s=0.3, retry_budget_s=4.0, parallel=8)


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    storage.configure(FAST)
    yield
    storage.configure(StorageSettings())


@pytest.fixture
def store() -> Iterator[FaultyStore]:
    with served(big=BIG, small=SMALL, empty=b"") as store:
        yield store


def counted(name: str, before: dict[str, float]) -> float:
    return statistics()[name] - before[name]


def test_a_web_server_is_read(store: FaultyStore):
    assert size_of(f"{store.url}/big") == len(BIG)
    assert storage.exists(f"{store.url}/small") and not storage.exists(f"{store.url}/none")
    assert read_range(f"{store.url}/big", 17, 1000) == BIG[17:1017]
    assert open_url(f"{store.url}/empty").read() == b"" and read_ranges(f"{store.url}/small", []) == []
    with open_url(f"{store.url}/big") as file:
        assert file.read(10) == BIG[:10] and file.seek(-5, os.SEEK_END) == len(BIG) - 5 and file.read() == BIG[-5:]
    before = statistics()
    assert open_url(f"{store.url}/big").read() == BIG
    assert counted("bytes", before) == len(BIG) and counted("requests", before) == 2 and counted("seconds", before) > 0


def test_ranges_that_are_near_are_asked_for_at_once(store: FaultyStore):
    size_of(f"{store.url}/big")
    ranges = [(5_000, 1_000), (0, 1_000), (1_500, 10), (0, 1_000), (700, 600), (9_000_000, 0), (9_000_001, 7)]
    assert read_ranges(f"{store.url}/big", ranges) == [BIG[offset : offset + size] for offset, size in ranges]
    assert sorted(store.gets()) == [(0, 5_999), (9_000_000, 9_000_007)]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failure_is_survived_and_counted(store: FaultyStore, fault: str):
    size_of(f"{store.url}/big")
    before, start = statistics(), time.monotonic()
    store.plan = [fault]
    assert read_range(f"{store.url}/big", 100, 5_000_000) == BIG[100:5_000_100]
    assert time.monotonic() - start < 3
    assert counted("retries", before) == (fault != "slow")
    looks = 2 if fault == "other" else 0  # at what the object is remembered by
    assert counted("requests", before) == 1 + (fault != "slow") + looks


@pytest.mark.parametrize("fault", ["cut", "short", "stall"])
def test_what_has_arrived_is_not_asked_for_again(store: FaultyStore, fault: str):
    size_of(f"{store.url}/big")
    before = statistics()
    store.plan = [fault]
    assert read_range(f"{store.url}/big", 0, 4_000_000) == BIG[:4_000_000]
    (first, _), (again, last) = store.gets()
    assert first == 0 and again >= 1_500_000 and last == 3_999_999
    assert counted("bytes", before) == 4_000_000


@pytest.mark.parametrize(
    "plan", [["other"], ["", "other"], ["503", "", "500", ""], ["stall"], ["other"] * 2, ["other"] * 4]
)
def test_the_first_look_can_fail_too(store: FaultyStore, plan: list[str]):
    store.plan = plan
    assert read_range(f"{store.url}/small", 0, 9) == SMALL[:9]
    assert size_of(f"{store.url}/small") == len(SMALL) and not store.plan


def test_a_first_look_at_a_shorter_object_is_not_believed_for_long(store: FaultyStore):
    store.objects["small"] = SMALL[:10]
    assert size_of(f"{store.url}/small") == 10
    store.objects["small"] = SMALL
    assert read_range(f"{store.url}/small", 50, 9) == SMALL[50:59]


def test_looks_that_never_agree_end(store: FaultyStore, monkeypatch: pytest.MonkeyPatch):
    """As of servers that take turns and each have a tag of their own."""
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.01)
    store.plan = ["", "other"] * 20
    with pytest.raises(DataError, match="replaced by another object"):
        size_of(f"{store.url}/small")


def test_what_was_forgotten_is_looked_at_anew(store: FaultyStore):
    assert read_range(f"{store.url}/small", 0, 9) == SMALL[:9]
    store.objects["small"] = SMALL[::-1]
    storage.forget(f"{store.url}/small")
    assert read_range(f"{store.url}/small", 0, 9) == SMALL[:-10:-1]


def test_a_store_where_a_fifth_of_requests_fail_gives_the_same_bytes(store: FaultyStore):
    store.share = 0.2
    choose = random.Random(3)
    ranges = [(choose.randrange(len(BIG) - 16384), 16384) for _ in range(150)]
    before, start = statistics(), time.monotonic()
    assert read_ranges(f"{store.url}/big", ranges) == [BIG[offset : offset + size] for offset, size in ranges]
    assert open_url(f"{store.url}/big").read() == BIG
    assert time.monotonic() - start < 10
    assert store.failed > 15 and counted("retries", before) > 10


def test_a_throttled_store_is_read_slowly_and_without_errors(store: FaultyStore):
    store.share, store.kinds = 1.0, ("slow",)
    before = statistics()
    assert open_url(f"{store.url}/big").read() == BIG
    assert counted("retries", before) == 0


@pytest.mark.parametrize(
    ("fault", "reason"), [("503", "HTTP 503"), ("reset", "the connection broke"), ("other", "replaced")]
)
def test_permanent_failure_is_told_within_the_budget(store: FaultyStore, fault: str, reason: str):
    storage.configure(StorageSettings(timeout_s=0.3, retry_budget_s=1.0))
    url = f"{store.url}/small?signature=secret"
    size_of(url)
    store.share, store.kinds = 1.0, (fault,)
    start = time.monotonic()
    with pytest.raises(DataError, match=reason) as caught:
        read_range(url, 0, 1000)
    assert time.monotonic() - start < 2
    text = str(caught.value)
    assert f"{store.url}/small cannot be read" in text and "secret" not in text and text.endswith(".")
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_a_lost_object_is_told_at_once(store: FaultyStore):
    size_of(f"{store.url}/small")
    del store.objects["small"]
    for read in (lambda: read_range(f"{store.url}/small", 0, 9), lambda: open_url(f"{store.url}/none")):
        start = time.monotonic()
        with pytest.raises(MissingError, match=r"does not exist, HTTP 404.*`sctrain prepare` again"):
            read()
        assert time.monotonic() - start < 1


def test_an_object_that_ends_too_early(store: FaultyStore):
    with pytest.raises(MissingError, match="ends before byte 100001, so it was cut short"):
        read_ranges(f"{store.url}/small", [(0, 10), (99_990, 11)])


def test_an_object_replaced_while_it_is_read_is_noticed(store: FaultyStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.01)
    storage.configure(StorageSettings(timeout_s=0.3, retry_budget_s=60.0))
    read_range(f"{store.url}/small", 0, 9)
    store.objects["small"] = SMALL[::-1]
    with pytest.raises(DataError, match="replaced by another object"):
        read_range(f"{store.url}/small", 0, 9)
    storage.configure(FAST)
    assert read_range(f"{store.url}/small", 0, 9) == SMALL[:-10:-1]


def test_signed_urls_are_sent_whole_and_need_no_head(store: FaultyStore):
    store.head_is_refused = True
    assert open_url(f"{store.url}/small?signature=a%2Fb&x=1").read() == SMALL


def test_one_lost_part_ends_the_whole_read(store: FaultyStore):
    size_of(f"{store.url}/big")
    store.share, store.kinds = 1.0, ("503",)
    storage.configure(StorageSettings(timeout_s=0.3, retry_budget_s=0.5, parallel=2))
    with pytest.raises(DataError, match="HTTP 503"):
        read_ranges(f"{store.url}/big", [(start * 100_000, 100) for start in range(50)])
    seen = len(store.asked)
    time.sleep(0.8)
    assert len(store.asked) - seen <= 2


PROGRAM = """
import os, sys
from data_pipeline import storage
url = sys.argv[1]
assert len(storage.read_range(url, 0, 9)) == 9
child = os.fork()
if not child:
    try:
        storage.read_range(url, 0, 9)
    except RuntimeError as error:
        os._exit(7 if "'spawn'" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_process_is_told_rather_than_left_hanging(store: FaultyStore):
    subprocess.run([sys.executable, "-c", PROGRAM, f"{store.url}/small"], check=True, timeout=60)
