"""Score distillation under ZeRO on two ranks: two networks are trained, three more are evaluated, as in one process."""

import pytest
from worlds import PROGRAMS, run_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return run_world(PROGRAMS / "zero_scores.py", 2, str(tmp_path_factory.mktemp("zero_scores")), timeout=240)


def test_losses_and_weights_are_those_of_one_process(world):
    for result in world:
        assert len(result) == 3
        for case in result.values():
            assert case["told"] == pytest.approx(case["expected"], rel=1e-4, abs=1e-5)
            assert max(case["weights"].values()) < 1e-4


def test_both_resume_exactly(world):
    for result in world:
        for case in result.values():
            assert case["resumed"] == case["told"][len(case["told"]) // 2 :]
