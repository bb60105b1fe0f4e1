"""Benchmarks: the arithmetic of their ratios, what they count, and that every command gives its rows."""

import json
import math
import os
import time

import pytest
import torch
from digits import publish_random, tiny_config

from data_pipeline.allocator import keep_freed_memory
from models.edm2_options import EDM2Options
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.dual import value_of
from models.tangent.engines import TANGENT_ENGINES
from sctrain import cli
from sctrain.bench.attention import AttentionRow, growth
from sctrain.bench.memory import footprint
from sctrain.bench.plain import plain_forward
from sctrain.bench.step import StepSettings, _network
from sctrain.bench.table import table
from sctrain.bench.timing import WARM_UP, Spread, Step, interleaved
from sctrain.evaluation.generation import Generator

MIB = 2**18  # float32 elements
SMALL = ["--width", "32", "--depth", "2", "--heads", "2", "--side", "8", "--rounds", "1"]
ROW = "objective engine checkpointing ranks ratio_median ratio_min ratio_max limit memory_ratio gathers".split()


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Networks so small that threads only wait for each other, all the longer where others use the cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def rows_of(capsys, *arguments: str) -> list[dict]:
    assert cli.main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ratios_are_to_the_baseline_runs_around(monkeypatch):
    """The machine slows down steadily: ratios of steps that cost twice as much stay 2."""
    now, speed = [0.0], [1.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def cost(units):
        def run():
            now[0] += units * speed[0]

        return Step(run, lambda: speed.__setitem__(0, speed[0] + 0.1))

    base, timed = interleaved(cost(1), {"twice": cost(2), "half": cost(0.5)}, rounds=3)
    assert timed["twice"].ratio.median == pytest.approx(2) == timed["twice"].ratio.lowest
    assert timed["half"].ratio.highest == pytest.approx(0.5)
    assert base.lowest == pytest.approx(1 + 0.1 * 3 * WARM_UP) and base.highest > base.median > base.lowest


def test_finishing_is_not_timed_and_rounds_count():
    calls = []
    step = Step(lambda: calls.append("run"), lambda: (calls.append("finish"), time.sleep(0.02)))
    base, _ = interleaved(step, {}, rounds=4)
    assert calls == ["run", "finish"] * (WARM_UP + 4) and base.median < 0.01
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_footprint_counts_live_bytes_once():
    kept = torch.ones(MIB)

    def run():
        a = torch.zeros(4 * MIB)  # 4 MiB
        del a
        b = torch.zeros(2 * MIB)
        c = b.view(2, MIB).t()[:, 0]  # no new memory
        d = kept.view(-1)[:10]  # nor here
        e = kept * 2  # 1 MiB
        return b, c, d, e

    assert footprint(run).peak_bytes == 4 * 2**20
    assert footprint(lambda: [torch.zeros(MIB) for _ in range(6)]).peak_bytes == 6 * 2**20
    assert footprint(run).gathers == 0


def test_growth_is_the_exponent():
    rows = [AttentionRow("blocked", n, 64, 1.0, 1.0, 1.0, 100 * n**2) for n in (256, 1024, 4096)]
    assert growth(rows) == pytest.approx(2)


def test_the_plain_network_is_the_same_function():
    network = _network(StepSettings(width=32, depth=2, heads=2, side=8), False, 0)
    u, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 999])
    torch.testing.assert_close(plain_forward(network, u, t, labels), network(u, t, labels)[0])


@pytest.mark.parametrize("name", ["edm2", "edm2-scm"])
def test_the_plain_edm2_is_the_same_function(name):
    options = EDM2Options(name, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16)
    network = build_network(options, 4, 8, 8, Conditioning(10))
    with torch.no_grad():
        network.head.gain.fill_(1.0)
    u, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 9])
    torch.testing.assert_close(plain_forward(network, u, t, labels), network(u, t, labels)[0])


def test_share_of_a_tangent():
    """Attention has four products for its two: 1.10 for the network of the figures, more with more tokens."""
    assert StepSettings().tangent_share == pytest.approx(1.10, abs=0.001)
    assert 1.10 < StepSettings(side=256).tangent_share < 2


def test_step_rows(capsys):
    rows = rows_of(capsys, "step", *SMALL, "--ranks", "1")
    assert all(set(ROW) <= set(row) for row in rows)
    found = {(row["objective"], row["engine"], row["checkpointing"]) for row in rows}
    students = {(name, engine) for name in cli._STUDENTS for engine in cli._ENGINES}
    assert {(*student, kept) for student in students for kept in (False, True)} <= found
    assert ("plain PyTorch diffusion", "none", False) in found
    for row in rows:
        assert row["ranks"] == 1 and 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        if row["engine"] == "single_pass":
            assert row["memory_ratio"] <= 1.15 and row["gathers"] == 0 and 1 < row["limit"] < 4


def test_step_table(capsys):
    assert cli.main(["bench", "step", *SMALL, "--ranks", "1", "--objectives", "sct", "--engines", "single_pass"]) == 0
    out, err = capsys.readouterr()
    assert "1 rank, no checkpointing" in out and "plain PyTorch diffusion" in out and "measuring" in err
    assert "DiT 32 x 2, 16 tokens, batch 4, fp32, 1 rounds" in out


def test_attention_rows(capsys):
    rows = rows_of(capsys, "attention", "--lengths", "64", "1024", "--head-dims", "16", "--rounds", "1")
    assert [(row["backend"], row["length"]) for row in rows] == [
        ("reference", 64),
        ("blocked", 64),
        ("reference", 1024),
        ("blocked", 1024),
    ]
    by = {(row["backend"], row["length"]): row for row in rows}
    assert by["blocked", 1024]["peak_bytes"] < by["reference", 1024]["peak_bytes"] / 2
    assert by["reference", 64]["ratio_to_value"] is None and by["blocked", 1024]["ratio_to_value"] > 1


def test_precision_rows(capsys, tmp_path):
    publish_random(tiny_config(tmp_path / "run", "sct"), 16)
    rows = rows_of(capsys, "precision", str(tmp_path / "run"), "--rounds", "1")
    error = {(row["value"], row["tangent"]): row["tangent_error"] for row in rows}
    assert 0 < error["fp32", "value"] < 1e-5 < error["bf16", "fp32"] <= error["bf16", "value"] < 0.2
    assert list(rows[0]["layers"]) == ["block 0"] and all(math.isfinite(row["cost"]) for row in rows)
    assert cli.main(["bench", "precision", str(tmp_path / "run"), "--rounds", "1"]) == 0
    assert "Tangent error after each block" in capsys.readouterr().out
    assert cli.main(["bench", "precision", str(tmp_path / "run"), "--ema", "2"]) == 2
    assert "--ema 2 is not a relative width between 0 and" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["edm", "ct"])
def test_precision_is_measured_at_what_the_network_is_told(capsys, monkeypatch, tmp_path, objective):
    """Some sigma are below 1, where EDM's ln(sigma) / 4 is negative, which no angle is."""
    publish_random(tiny_config(tmp_path / "run", objective, noise_input="log_sigma"), 16)
    least, of = [], Generator.of

    def watched(*arguments):
        generator = of(*arguments)
        generator.network.register_forward_pre_hook(lambda _, inputs: least.append(value_of(inputs[1]).min().item()))
        return generator

    monkeypatch.setattr(Generator, "of", staticmethod(watched))
    rows_of(capsys, "precision", str(tmp_path / "run"), "--rounds", "1")
    assert len(least) > 5 and max(least) < 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["step", "--batch", "3", "--ranks", "2"], "--batch 3 does not divide among [2] ranks"),
        (["step", "--width", "100"], "--width a multiple of 4 x --heads"),
        (["step", "--precision", "bf16"], "bf16 rounds finite differences to noise"),
        (["step", "--rounds", "0"], "'0' is not a whole number of at least 1"),
        (["attention", "--lengths", "-5"], "see `sctrain bench attention --help`"),
        (["precision", "nowhere"], "nowhere has no snapshots"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, sentence, capsys):
    assert cli.main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err


def test_names_of_the_command_line_are_those_of_the_engines():
    assert tuple(TANGENT_ENGINES) == cli._ENGINES


def test_tables_are_aligned():
    assert table(("name", "x"), [("a", "10.5"), ("longer", "1")]) == "name       x\na       10.5\nlonger     1"


def test_allocator_setting_is_harmless():
    keep_freed_memory()
    assert torch.ones(10**6).sum() == 10**6
