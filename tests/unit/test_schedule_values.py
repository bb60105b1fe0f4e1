"""Schedules against the papers' values: a direct integral, every stage of ECT, learning rates, widths of the EMA."""

import math

import numpy as np
import pytest
import torch

from sctrain.config.loading import load
from sctrain.objectives.levels import Grid, ct_decay, ct_levels, ect_mapping, ect_stage, lognormal_cells
from sctrain.schedules import learning_rate


@pytest.mark.parametrize("count", [11, 21, 41, 81, 161, 321, 641, 1281])
def test_cells_are_the_integral_of_the_lognormal_density(count: int):
    """By the midpoint rule, at every N of iCT's curriculum."""
    edges = Grid().levels(count).log().numpy()
    inner = np.linspace(0, 1, 2001)
    middles = edges[:-1, None] + np.diff(edges)[:, None] * (inner[:-1] + 0.5 / 2000)
    mass = np.exp(-0.5 * ((middles + 1.1) / 2.0) ** 2).mean(axis=1) * np.diff(edges)
    cells = lognormal_cells(Grid().levels(count), -1.1, 2.0)
    assert cells.sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(cells.numpy(), mass / mass.sum(), rtol=1e-6)


def test_decay_of_ct_follows_its_levels_from_mu0_to_the_end():
    """mu(0) = mu0 exactly, since N(0) = s0; ImageNet-64: s0 2, s1 200, mu0 0.95."""
    assert ct_decay(ct_levels(0, 2, 200), 2, 0.95) == pytest.approx(0.95)
    assert ct_decay(ct_levels(1, 2, 200), 2, 0.95) == pytest.approx(0.95 ** (2 / 201))
    decays = [ct_decay(ct_levels(k / 100, 2, 200), 2, 0.95) for k in range(101)]
    assert decays == sorted(decays)


@pytest.mark.parametrize("stage", range(8))
def test_gap_of_ect_in_every_stage(stage: int):
    """1 - r/t = n(t) / 2^(a + 1) and at most 1, where n falls from 5 at t = 0 to 1 far out."""
    t = torch.tensor([1e-9, 2.0, 60.0], dtype=torch.float64)
    gap = 1 - ect_mapping(t, stage, 2.0, 8.0, 1.0) / t
    n = torch.tensor([5.0, 1 + 8 / (1 + math.e**2), 1.0], dtype=torch.float64)
    torch.testing.assert_close(gap, (n / 2 ** (stage + 1)).clamp(max=1), rtol=1e-8, atol=0)
    begins, ends = stage / 8, (stage + 1) / 8
    assert ect_stage(begins, 8) == stage == ect_stage(ends - 1e-6, 8) and ect_stage(ends, 8) == min(stage + 1, 7)


def test_rates_of_edm2():
    """ImageNet-512, S: 0.01 after a ramp of 10 Mimg, until 70,000 iterations; half of it after four times as many."""
    config = load("imagenet512/trigflow-s.yaml")

    def rate(images: float) -> float:
        return learning_rate(config.optimizer, round(images), config.budget_images)

    assert rate(0) == 0 and rate(5e6) == pytest.approx(0.005) and rate(10e6) == rate(70_000 * 2048) == 0.01
    assert rate(4 * 70_000 * 2048) == pytest.approx(0.005)
    assert rate(config.budget_images) == pytest.approx(0.01 / math.sqrt(1048 / 70))


def test_rates_of_consistency_models_are_a_hundredth_of_their_teachers():
    for size in ("s", "m", "l", "xl", "xxl"):
        teacher, student = (load(f"imagenet512/{name}-{size}.yaml").optimizer for name in ("trigflow", "scd"))
        assert student.learning_rate == pytest.approx(0.01 * teacher.learning_rate)
        assert student.reference_images == teacher.reference_images


def test_widths_that_stand_for_a_fixed_decay():
    """Decay b over K steps averages over 1/(1 - b): the width of its profile is 1/((1 - b) K), as the recipes say."""
    for recipe, decay, iterations in (
        ("cifar10/cd", 0.9999, 800_000),
        ("imagenet64/cd", 0.999943, 600_000),
        ("imagenet64/ct", 0.999943, 800_000),
        ("lsun256/ct-cat", 0.999943, 1_000_000),
        ("cifar10/ict", 0.99993, 400_000),
        ("imagenet64/ict", 0.99997, 800_000),
        ("cifar10/ect", 0.9999, 400_000),
    ):
        width = load(f"{recipe}.yaml").evaluation.ema[0]
        ages = np.arange(iterations)
        weights = decay**ages
        mean = np.average(ages, weights=weights)
        spread = math.sqrt(np.average((ages - mean) ** 2, weights=weights)) / iterations
        assert width == pytest.approx(spread, rel=0.03), recipe
