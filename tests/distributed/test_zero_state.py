"""Sharded EMA and checkpoints on real engines, ZeRO-3 and ZeRO-0: 2 ranks save, 2, 1 and 3 ranks load."""

import pytest
from worlds import PROGRAMS, run_world

OFFLOADED = ("cpu", "bf16-cpu", "disk", "bf16-disk", "bf16-disk-as-on-gpus", "weights-on-cpu", "hpz")
VARIANTS = ("fp32", "persistent", "bf16", "bf16-persistent", "replicated", "bf16-replicated", *OFFLOADED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero_state")


@pytest.fixture(scope="module")
def two_ranks(folder):
    results = run_world(PROGRAMS / "zero_state.py", 2, "save", str(folder), may_die={1})
    assert all("save" in result for result in results)
    return results


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.full), 3])
def other_world(request, folder, two_ranks):
    return run_world(PROGRAMS / "zero_state.py", request.param, "load", str(folder))


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_world_repeats_bit_for_bit(two_ranks, variant):
    for result in two_ranks:
        saved = result["save"][variant]
        assert saved["found"] == "000000000036"
        assert saved["record"] == {"note": variant, "optimizer_step": 3}
        assert saved["state_restored"]
        assert saved["restored_losses"] == saved["losses"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_from_before_the_first_step(two_ranks, variant):
    """DeepSpeed makes the moments at the first step; restoring a state without them forgets those there are."""
    saved = two_ranks[0]["save"][variant]
    assert not saved["moments_before_training"] and saved["fresh_step"] == 0
    assert saved["untrained_restored"]
    assert saved["retrained_losses"][3:] == saved["losses"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_worlds_restore_the_whole_state(two_ranks, other_world, variant):
    """Masters, moments and EMA tracks exactly; the next losses as far as the order of sums in the precision allows."""
    saved, restored = two_ranks[0]["save"][variant], other_world[0][variant]
    assert restored["record"] == saved["record"]
    kinds = {key.partition("/")[0] for key in restored["fingerprint"]}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema-0.05", "ema-0.1"}
    assert restored["fingerprint"] == pytest.approx(saved["fingerprint"], rel=1e-12)
    tolerance = 1e-2 if "bf16" in variant or variant == "hpz" else 1e-6
    assert restored["losses"] == pytest.approx(saved["losses"], rel=tolerance)
    assert restored["losses"][0] == pytest.approx(saved["losses"][0], rel=1e-6)


def test_ema_equals_that_of_the_whole_weights(two_ranks):
    ema = two_ranks[0]["ema"]
    assert max(ema["errors"]) < 1e-6
    assert ema["moved"] > 1e-3
    assert ema["shapes"]["4.weight"] == [3, 5] and ema["shapes"]["5.bias"] == [1]
    assert all(ema["unchanged"]) and ema["unchanged"]
    assert two_ranks[1]["ema"]["errors"] == []  # only rank 0 gathers


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewritten_masters_reach_the_forward(two_ranks, variant):
    for result in two_ranks:
        loss, expected = result["rewrite"][variant]
        assert loss == expected


def test_all_ranks_refuse_what_one_finds_damaged(two_ranks):
    said = [result["damaged"] for result in two_ranks]
    assert "another rank could not read" in said[0]
    assert "rank-00001.safetensors is corrupt" in said[1]


def test_rank_killed_while_saving(two_ranks):
    killed = two_ranks[0]["killed"]
    assert "rank 1 wrote nothing within 1 s" in killed["error"] and "older checkpoints are untouched" in killed["error"]
    assert killed["names"] == ["000000000012"]
    assert killed["loaded"]
    assert "killed" not in two_ranks[1]
