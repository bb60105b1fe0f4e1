"""Objectives with exact tangents through ZeRO-3, on two ranks, against an unsharded network."""

import pytest
from worlds import PROGRAMS, run_world


@pytest.fixture(scope="module")
def two_ranks():
    return run_world(PROGRAMS / "zero_tangents.py", 2, "exact")


@pytest.mark.parametrize("name", ["trigflow", "sct", "scd", "accumulated"])
def test_losses_tangents_and_gradients_equal_the_unsharded_ones(two_ranks, name):
    for result in two_ranks:
        assert result[name]["loss"] < 5e-6
        assert result[name]["tangent_norm"] < 2e-5
        assert 0 < result[name]["gradient"] < 1e-5


def test_finite_differences_agree(two_ranks):
    for result in two_ranks:
        assert 0 < result["difference"]["tangent_norm"] < 5e-3


def test_a_non_finite_gradient_moves_nothing(two_ranks):
    for result in two_ranks:
        assert result["skipped"] == {"applied": False, "unmoved": True}


def test_bf16(two_ranks):
    for result in two_ranks:
        assert result["bf16"]["dtype"] == "torch.float32" and result["bf16"]["finite"] and result["bf16"]["moved"]
        assert 0 < result["bf16"]["error"] < 0.05


def test_without_the_hooks_mend_tangents_do_not_pass():
    """The mutation: if this passes through unpatched hooks, DeepSpeed changed and `carry_tangents` may go."""
    for result in run_world(PROGRAMS / "zero_tangents.py", 2, "unpatched"):
        assert "lose its tangent" in result["error"]
