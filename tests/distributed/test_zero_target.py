"""Discrete consistency and its target networks on real engines, ZeRO-3 and ZeRO-0, against an unsharded run."""

import pytest
from worlds import PROGRAMS, run_world

CASES = (
    *("cd adam stage3", "cd radam stage0", "cd radam stage3 bf16", "cd adam stage0 bf16"),
    *("ct radam stage3", "ct adam stage0", "ict radam stage3"),
)
WITH_TARGET = [case for case in CASES if not case.startswith("ict")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero_target")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_world(PROGRAMS / "zero_target.py", 2, "save", str(folder), timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_unsharded_ones(two_ranks, case):
    """With dropout: student and target draw one mask, on engines of their own too."""
    for result in two_ranks:
        bf16 = "bf16" in case
        assert result[case]["loss"] < (0.2 if bf16 else 1e-5) and result[case]["gradient"] < (0.3 if bf16 else 2e-5)
        assert result[case]["unused"] and all(name.startswith("weighting.") for name in result[case]["unused"])


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case])
def test_weights_after_ramp_and_inverse_square_root_equal_the_unsharded_ones(two_ranks, case):
    """Adam and RAdam, the latter beyond the steps in which it does not adapt; relative to how far they moved."""
    for result in two_ranks:
        assert result[case]["moved"] > 1e-3 and result[case]["weights"] < 1e-4


@pytest.mark.parametrize("case", WITH_TARGET)
def test_the_target_is_the_average_of_the_masters(two_ranks, case):
    """In bf16 too, where an average of the weights that forwards use would stand still."""
    for result in two_ranks:
        assert result[case]["average"] < 1e-6
        assert result[case]["computes"] < (0.05 if "bf16" in case else 1e-5)


@pytest.mark.parametrize("case", WITH_TARGET)
def test_keep_0_copies_the_student_and_keep_1_nothing(two_ranks, case):
    for result in two_ranks:
        assert result[case]["copied"] and result[case]["kept"]
        assert result[case]["computes_copy"] < (0.05 if "bf16" in case else 1e-5)


def test_a_target_that_teaches_has_no_dropout(two_ranks):
    assert all(result["teaches"] for result in two_ranks)


@pytest.mark.parametrize("case", CASES)
def test_the_same_world_goes_on_bit_for_bit(two_ranks, case):
    for result in two_ranks:
        assert result[case]["restored"]
        assert result[case]["restored_losses"] == result[case]["losses"]


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 3])
def test_other_worlds_restore_every_value(two_ranks, folder, world):
    restored = run_world(PROGRAMS / "zero_target.py", world, "load", str(folder))
    for case in CASES:
        kinds = {name.partition("/")[0] for name in restored[0][case]["fingerprint"]}
        assert kinds == ({"master", "target"} if case in WITH_TARGET else {"master"})
        assert all(result[case]["fingerprint"] == two_ranks[0][case]["fingerprint"] for result in restored)
