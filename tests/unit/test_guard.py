"""What counts as a spike, when a run goes back or stops, and what the record remembers."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from sctrain.config.schema import GuardConfig
from sctrain.errors import UserError
from sctrain.guard import LEAST_HISTORY, check, check_dropped, is_spike, median_norm, must_roll_back
from sctrain.monitor import Monitor
from sctrain.objectives.base import Draws, Loss
from sctrain.record import Record

GUARD = GuardConfig(spike_factor=5, spike_window=16, spikes_before_rollback=3, max_rollbacks=2)
CALM = Record(images=1000, norms=(1.0,) * 15 + (100.0,))


def after(record: Record, norm: float) -> Record:
    spike = is_spike(norm, record, GUARD)
    applied = math.isfinite(norm) and not spike
    return record.after_step(10, norm, applied=applied, spike=spike, window=GUARD.spike_window)


def test_a_spike_is_far_above_the_median_not_the_mean():
    assert median_norm(CALM) == 1.0
    assert is_spike(5.01, CALM, GUARD) and not is_spike(4.99, CALM, GUARD)
    assert not is_spike(1e9, CALM, GUARD.model_copy(update={"spike_factor": 0.0}))


def test_nothing_is_a_spike_before_there_is_a_history():
    young = Record(norms=(1.0,) * (LEAST_HISTORY - 1))
    assert median_norm(young) is None and not is_spike(1e9, young, GUARD)
    assert is_spike(1e9, after(young, 1.0), GUARD)


def test_the_record_counts_and_forgets():
    record = after(after(after(CALM, 2.0), 50.0), float("nan"))
    assert record.images == 1030 and record.norms == (*(1.0,) * 14, 100.0, 2.0), "only steps taken are remembered"
    assert (record.spikes, record.skipped, record.skipped_in_row) == (1, 1, 2)
    assert record.recent_spikes == (1010,)
    for _ in range(15):
        record = after(record, 1.0)
    assert record.recent_spikes == () and record.spikes == 1 and record.skipped_in_row == 0
    assert Record.from_json(json.loads(json.dumps(asdict(record))) | {"more": 1}) == record


def test_several_spikes_in_the_window_send_the_run_back_past_their_samples():
    record = CALM
    for norm in (50.0, 1.0, 50.0, 1.0):
        record = after(record, norm)
        assert not must_roll_back(record, GUARD)
    record = after(record, 50.0)
    assert must_roll_back(record, GUARD) and not must_roll_back(
        record, GUARD.model_copy(update={"spikes_before_rollback": 0})
    )
    back = record.rolled_back_to(Record(images=960, norms=(1.0,) * 16))
    assert (back.images, back.position, back.rollbacks) == (960, record.position, 1)
    assert not must_roll_back(back, GUARD)
    again = after(back, 1.0).rolled_back_to(Record(images=960))
    assert again.position == record.position + 10


def test_a_run_that_keeps_falling_back_is_stopped():
    sick = replace(CALM, recent_spikes=(1, 2, 3), rollbacks=2)
    with pytest.raises(UserError, match=r"after 2 rollbacks: lower optimizer.learning_rate.*guard.max_rollbacks"):
        check(sick, GUARD, "runs/a")
    check(replace(sick, rollbacks=1), GUARD, "runs/a")
    with pytest.raises(UserError, match=r"21 steps in a row were dropped.*guard.max_skipped_steps"):
        check(replace(CALM, skipped_in_row=21), GUARD, "runs/a")


def test_dropped_samples_are_bounded():
    check_dropped(0.01, 100, GUARD)
    with pytest.raises(
        UserError, match=r"1.5% of the samples.*compute.tangent_precision to fp32.*guard.max_dropped_share"
    ):
        check_dropped(0.015, 100, GUARD)


class Alone:
    device = torch.device("cpu")

    def sum(self, values):
        return values.clone()


def test_the_monitor_leaves_dropped_samples_out_of_the_means():
    monitor = Monitor(Alone())
    draws = Draws(torch.zeros(4, 1), torch.zeros(4, 1), torch.tensor([0.1, 0.2, 1.0, 1.5]), torch.zeros(4), r=0.5)
    norms = torch.tensor([1.0, float("inf"), 2.0, 3.0])
    dropped = torch.tensor([False, True, False, False])
    losses = torch.tensor([4.0, 0.0, float("nan"), 6.0])
    monitor.add(draws, Loss(losses, {"tangent_norm": norms}, dropped))
    means = monitor.means()
    assert means["guard/dropped_samples"] == 2 and means["guard/dropped_share"] == 0.5
    assert means["loss/all"] == 5.0 and means["tangent_norm/t0.0-0.4"] == 1.0 and means["tangent_norm/t1.2-1.6"] == 3.0
    assert "tangent_norm/t0.8-1.2" not in means and means["objective/warmup"] == 0.5
    monitor.add(draws, Loss(torch.ones(4)))
    assert monitor.means()["guard/dropped_samples"] == 0
