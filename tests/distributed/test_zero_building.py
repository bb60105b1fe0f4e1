"""Networks that are never whole on a rank: their weights, and the memory that making and loading them takes."""

import pytest
from worlds import PROGRAMS, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero_building")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_world(PROGRAMS / "zero_building.py", 2, str(folder))


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.full)])
def other_world(request, folder):
    return run_world(PROGRAMS / "zero_building.py", request.param, str(folder))


def test_initial_weights_depend_on_neither_ranks_nor_stage(two_ranks, other_world):
    weights = two_ranks[0]["weights"]
    assert len(weights["3"]) == 26 and len(set(weights["3"].values())) == 26
    assert weights["3"] == weights["0"] == other_world[0]["weights"]["3"] == other_world[0]["weights"]["0"]


def test_they_reach_the_forward(two_ranks):
    for result in two_ranks:
        assert result["values"]["3"] == result["values"]["0"] == result["expected"] > 0


@pytest.mark.parametrize("what", ["student", "teacher", "publishing"])
def test_memory_is_that_of_a_shard_and_a_layer(two_ranks, what):
    for result in two_ranks:
        assert 0.5 < result["peaks"][what] <= 1.2


def test_weights_that_are_set_again_count_with_every_option_of_zero(two_ranks):
    for result in two_ranks:
        assert len(result["options"]) == 4
        for name, (frozen, trained, expected) in result["options"].items():
            assert frozen == trained == expected, name
