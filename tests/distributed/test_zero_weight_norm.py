"""Forced weight normalisation on shards, and EDM2 networks trained along their tangents: as on one whole copy."""

import pytest
from worlds import PROGRAMS, run_world

VARIANTS = ("edm2", "persistent", "bf16", "replicated", "bf16-replicated")


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    return run_world(PROGRAMS / "zero_weight_norm.py", request.param, timeout=200)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_divided_as_on_the_whole_weight(results, variant):
    """The factor is rounded to float32, and its product once more: two parts in 1e7."""
    found = results[0][variant]
    assert found["error"] < 2e-7
    assert found["moved"] > 1e-3  # or nothing was to be divided


@pytest.mark.parametrize("variant", VARIANTS)
def test_forwards_see_the_divided_weights(results, variant):
    assert results[0][variant]["unseen"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_that_of_the_whole_network(results, variant):
    """Weights move by up to 0.01 in each of three steps; Adam divides gradients near zero by their own size."""
    tolerance = {"abs": 2e-2} if "bf16" in variant else {"rel": 1e-5}
    for result in results:
        found = result[variant]
        assert found["losses"] == pytest.approx(found["whole_losses"], **tolerance)
    if "bf16" not in variant:
        assert results[0][variant]["apart"] < 1e-3
