"""Objectives with exact tangents under ZeRO, on two and three ranks, against an unsharded network."""

import math

import pytest
from worlds import PROGRAMS, run_world

OPTIONS = ("hpz", "weights-on-cpu", "optimizer-on-cpu")


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.full)])
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def world(ranks):
    return run_world(PROGRAMS / "zero_tangents.py", ranks, "half" if ranks == 2 else "every", timeout=240)


def cases(world, *words, without=()):
    """Errors of the cases with these words in their names, over all ranks."""
    found = [
        errors
        for result in world
        for name, errors in result.items()
        if set(words) <= set(name.split()) and not set(without) & set(name.split())
    ]
    assert found
    return found


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2", "stage3"])
def test_losses_tangents_and_gradients_equal_the_unsharded_ones(world, stage):
    """With and without checkpointing, accumulation and dropout; all that have tangents."""
    for errors in cases(world, stage, without=("bf16", "finite_difference")):
        assert errors["loss"] < 1e-5 and errors["tangent_norm"] < 2e-5 and errors["gradient"] < 2e-5


def test_the_combinations_were_there(world, ranks):
    """On two ranks half of them, on three all."""
    found = cases(world, "sct", "single_pass", without=("wide", "stage1", "stage2", "ncsnpp", *OPTIONS))
    assert len(found) == (16 if ranks == 2 else 32) * len(world)


@pytest.mark.parametrize("network", ["ncsnpp", "adm"])
def test_u_nets_were_there(world, network):
    assert len(cases(world, network, "stage3", "single_pass")) == len(world)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_zero_change_nothing(world, option):
    assert len(cases(world, option)) == 2 * len(world)
    for errors in cases(world, option):
        assert errors["loss"] < 1e-5 and errors["tangent_norm"] < 2e-5 and errors["gradient"] < 2e-5


@pytest.mark.parametrize("name", ["segments", "scd_discrete", "cd_continuous"])
def test_every_method_was_there_in_both_stages(world, name):
    assert len(cases(world, name, "stage0")) == len(cases(world, name, "stage3")) == len(world)


def test_gradients_pass_through_tangents_in_stage_0(world):
    for errors in cases(world, "cd_full", "recorded", "stage0"):
        assert errors["loss"] < 1e-5 and errors["gradient"] < 2e-5


def test_finite_differences_agree(world):
    for errors in cases(world, "finite_difference"):
        assert 0 < errors["tangent_norm"] < 5e-3 and errors["gradient"] < 5e-2


@pytest.mark.parametrize("stage", ["stage0", "stage3"])
def test_bf16(world, stage):
    """Weights and activations in bf16, against float32; with checkpointing, accumulation and dropout."""
    for errors in cases(world, "bf16", stage):
        assert 1e-4 < errors["loss"] < 0.05 and 1e-4 < errors["tangent_norm"] < 0.05 and errors["gradient"] < 0.2


@pytest.mark.parametrize("stage", ["stage0", "stage3"])
def test_a_step_that_is_refused_or_not_finite_moves_nothing(world, stage):
    for result in world:
        told = result["dropped"]
        assert told[f"{stage} nan True"][:2] == [False, True] and math.isnan(told[f"{stage} nan True"][2])
        applied, unmoved, norm = told[f"{stage} 1.0 False"]
        assert not applied and unmoved and norm > 0
        applied, unmoved, same = told[f"{stage} 1.0 True"]
        assert applied and not unmoved and same == pytest.approx(norm)
        assert told[f"{stage} asked"] == [norm, same], "of a gradient that is not finite nobody is asked"
        assert told[f"{stage} steps"] == 1


def test_without_the_hooks_mend_tangents_do_not_pass(world):
    """The mutation: if this passes through unpatched hooks, DeepSpeed changed and `carry_tangents` may go."""
    for result in world:
        assert "lose its tangent" in result["unpatched"]
