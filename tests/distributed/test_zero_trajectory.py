"""CTM under ZeRO on two ranks against an unsharded run: gradients pass the target network, the balance is common."""

import pytest
from worlds import PROGRAMS, run_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return run_world(PROGRAMS / "zero_trajectory.py", 2, str(tmp_path_factory.mktemp("zero_trajectory")), timeout=240)


@pytest.mark.parametrize("stage", ["stage0", "stage3"])
def test_losses_and_gradients_are_those_of_one_process(world, stage):
    cases = [errors for result in world for name, errors in result["exact"].items() if stage in name.split()]
    assert len(cases) >= 4
    for errors in cases:
        assert errors["loss"] < 5e-6 and errors["balance"] < 5e-6
        assert errors["gradient"] < 2e-5


def test_gradients_reach_the_input_of_a_sharded_target(world):
    for result in world:
        assert all(errors["through_target"] < 5e-6 for errors in result["exact"].values())


def test_the_discriminator_trains_as_in_one_process_and_resumes_exactly(world):
    for duel in (result["duel"] for result in world):
        assert len(duel["told"]) == 7, "one loss, then two each step"
        assert duel["told"] == pytest.approx(duel["unsharded"], rel=1e-4)
        assert duel["late"] == duel["told"][-2:], "saved with the discriminator's moments"
        assert duel["early"] == duel["told"][1:], "saved before it had any"


def test_deepspeeds_engine_would_refuse_them(world):
    """The mutation: if frozen networks may be differentiated through their engines, DeepSpeed changed."""
    for result in world:
        assert "backward() are not supported" in result["by_engine"]
