"""What a person sees while a run trains, and the scalars that stay."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sctrain.reporting.console import StatusLine, memory_bytes, say
from sctrain.reporting.scalars import ScalarWriter, read_stats
from sctrain.runs import RunFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_where_nobody_watches_there_is_one_line_per_interval(clock: list[float]):
    stream = io.StringIO()
    status = StatusLine(4000, start=1000, stream=stream)
    clock[0] += 4
    speed = status.update(2000, loss=0.12345, wait_seconds=1.0)
    assert re.fullmatch(
        r"2,000/4,000 img \(50\.0%\)  250 img/s  eta 0:00:08  loss 0\.1235  data wait 25\.0%  memory \d+\.\d GiB\n",
        stream.getvalue(),
    )
    assert (speed["speed/images_per_second"], speed["speed/data_wait"]) == (250.0, 0.25)
    assert speed["speed/memory_gib"] == pytest.approx(memory_bytes() / 2**30, rel=0.2)


def test_speed_and_waiting_are_those_of_the_last_interval(clock: list[float]):
    status = StatusLine(4000, stream=io.StringIO())
    clock[0] += 4
    status.update(1000, loss=1.0, wait_seconds=4.0)
    clock[0] += 2
    speed = status.update(2000, loss=1.0, wait_seconds=4.5)
    assert (speed["speed/images_per_second"], speed["speed/data_wait"]) == (500.0, 0.25)


def test_no_progress_has_no_eta(clock: list[float]):
    stream = io.StringIO()
    clock[0] += 1
    StatusLine(4000, stream=stream).update(0, loss=1.0, wait_seconds=0.0)
    assert "eta unknown" in stream.getvalue()


def test_a_person_sees_a_bar():
    stream = Terminal()
    status = StatusLine(4000, start=1000, stream=stream)
    status.update(2000, loss=0.5, wait_seconds=0.0)
    status.close()
    assert "\r" in stream.getvalue() and "50%" in stream.getvalue() and "loss 0.5" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_measure_in_silence(stream: io.StringIO, capsys: pytest.CaptureFixture[str]):
    status = StatusLine(4000, enabled=False, stream=stream)
    assert status.update(1000, loss=0.5, wait_seconds=0.0)["speed/images_per_second"] > 0
    status.say("nothing")
    status.close()
    assert (stream.getvalue(), *capsys.readouterr()) == ("", "", "")


def test_sentences_go_to_stderr(capsys: pytest.CaptureFixture[str]):
    say("one")
    StatusLine(1).say("two")
    assert capsys.readouterr() == ("", "one\ntwo\n")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def logged(run: RunFolder, start: int, *images: int, value: float = 1.0) -> None:
    writer = ScalarWriter(run, start)
    for count in images:
        writer.write(count, {"loss/all": value})
    writer.close()


def curve(run: RunFolder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.tensorboard / "train")).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/all")]


def test_scalars_are_kept_over_images(run: RunFolder):
    logged(run, 0, 10, 20, value=0.5)
    assert read_stats(run.stats) == [{"images": 10, "loss/all": 0.5}, {"images": 20, "loss/all": 0.5}]
    assert curve(run) == [(10, 0.5), (20, 0.5)]


def test_what_lies_beyond_the_resumed_count_is_dropped(run: RunFolder):
    logged(run, 0, 10, 20, 30, value=1.0)
    logged(run, 20, 30, 40, value=2.0)
    expected = [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    assert [(line["images"], line["loss/all"]) for line in read_stats(run.stats)] == expected
    assert curve(run) == expected


def test_a_half_written_line_is_dropped(run: RunFolder):
    logged(run, 0, 10)
    with run.stats.open("a") as file:
        file.write('{"images": 20, "loss')
    assert [line["images"] for line in read_stats(run.stats)] == [10]
    logged(run, 10, 20)
    assert [json.loads(line)["images"] for line in run.stats.read_text().splitlines()] == [10, 20]


def test_json_holds_null_where_a_value_is_not_finite(run: RunFolder):
    logged(run, 0, 10, value=float("nan"))
    assert read_stats(run.stats) == [{"images": 10, "loss/all": None}]


def test_other_ranks_write_nothing(run: RunFolder):
    writer = ScalarWriter(run, enabled=False)
    writer.write(10, {"loss/all": 1.0})
    writer.close()
    assert not run.root.exists()
