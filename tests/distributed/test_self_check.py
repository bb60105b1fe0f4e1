"""The check of tangents on real, sharded networks of two ranks."""

import pytest
from worlds import PROGRAMS, run_world

VARIANTS = ["fp32", "fp32-persistent", "bf16", "bf16-persistent", "replicated", "bf16-replicated"]


@pytest.fixture(scope="module")
def two_ranks():
    return run_world(PROGRAMS / "self_check.py", 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_tangents_are_verified_on_the_masters(two_ranks, variant):
    for result in two_ranks:
        for verdict in result[variant]["verdicts"]:
            assert len(verdict["blocks"]) == 7 and all(0 < error < 3e-3 for error in verdict["blocks"].values())
            if "bf16" in variant:
                assert 1e-4 < verdict["running"]["running precision"] < 0.05
            else:
                assert verdict["running"] == {}


def test_all_ranks_come_to_the_same_verdict(two_ranks):
    for variant in VARIANTS:
        assert two_ranks[0][variant]["verdicts"] == two_ranks[1][variant]["verdicts"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_check_changes_nothing(two_ranks, variant):
    for result in two_ranks:
        assert result[variant]["losses"] == result[variant]["plain"]


def test_the_float32_copy_is_given_up(two_ranks):
    for variant in ("bf16", "bf16-persistent"):
        assert two_ranks[0][variant]["released"] == [0, 0]


def test_engines_start_without_a_compiler_that_nobody_asked_for(two_ranks):
    assert not any(result["compiler"] for result in two_ranks)


def test_a_tangent_that_a_hook_spoils_is_found_in_its_block(two_ranks):
    for verdict in two_ranks[0]["spoilt"]:
        assert verdict["blocks"]["blocks.0"] < 3e-3 and verdict["blocks"]["blocks.1"] > 0.02
