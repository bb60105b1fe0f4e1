"""Draws by (seed, position, purpose)."""

import torch

from sctrain.randomness import Purpose, SampleGenerator


def test_all_draws_are_float32():
    """Numpy gives a single number as a double, which no guided network could be told in float32."""
    generator = SampleGenerator(0, [3, 4], Purpose.TRAINING)
    draws = (generator.uniform(), generator.normal(), generator.normal((2, 2)))
    assert [draw.dtype for draw in draws] == [torch.float32] * 3
    assert [tuple(draw.shape) for draw in draws] == [(2,), (2,), (2, 2, 2)]
