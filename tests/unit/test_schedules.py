"""The learning rate over images."""

import pytest

from sctrain.config.schema import OptimizerConfig
from sctrain.schedules import learning_rate


def rate(images: int, **keys: float) -> float:
    return learning_rate(OptimizerConfig(learning_rate=2.0, **keys), images, 1000)


def test_constant_where_nothing_is_asked_for():
    assert rate(0) == rate(500) == rate(2000) == 2.0


def test_ramp():
    assert (
        rate(25, ramp_images=100) == pytest.approx(0.5)
        and rate(100, ramp_images=100) == rate(900, ramp_images=100) == 2.0
    )


def test_inverse_square_root_after_the_reference():
    assert rate(200, reference_images=200) == 2.0 and rate(800, reference_images=200) == pytest.approx(1.0)


def test_cool_down_ends_at_zero_and_never_below():
    assert rate(800, cooldown_images=200) == 2.0 and rate(950, cooldown_images=200) == pytest.approx(0.5)
    assert rate(1000, cooldown_images=200) == rate(1020, cooldown_images=200) == 0.0
