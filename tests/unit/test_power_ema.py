"""Power-function EMA against quadrature, published values and directly accumulated averages."""

import itertools

import numpy as np
import pytest

from sctrain.power_ema import (
    decay,
    gamma_from_width,
    posthoc_coefficients,
    profile_inner_product,
    width_from_gamma,
)


def profile(tau, images, gamma):
    return np.where(tau <= images, (gamma + 1) * tau**gamma / images ** (gamma + 1), 0.0)


def integral(f, end, nodes=400):
    x, w = np.polynomial.legendre.leggauss(nodes)
    return float((f((x + 1) * end / 2) * w).sum() * end / 2)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.01, 96.99)])
def test_gamma_of_published_widths(width, gamma):
    assert gamma_from_width(width) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.25])
def test_width_is_the_standard_deviation_of_the_profile(width):
    gamma = gamma_from_width(width)
    mean = integral(lambda tau: tau * profile(tau, 1.0, gamma), 1.0)
    variance = integral(lambda tau: (tau - mean) ** 2 * profile(tau, 1.0, gamma), 1.0)
    assert variance**0.5 == pytest.approx(width, rel=1e-8)
    assert width_from_gamma(gamma) == pytest.approx(width, rel=1e-10)


@pytest.mark.parametrize("width", [0.0, 0.2887, -0.1])
def test_impossible_widths_are_refused(width):
    with pytest.raises(AssertionError):
        gamma_from_width(width)


@pytest.mark.parametrize(("a", "b"), [((1.0, 3.0), (2.5, 7.0)), ((2.5, 7.0), (1.0, 3.0)), ((2.0, 4.0), (2.0, 9.0))])
def test_inner_product_against_quadrature(a, b):
    expected = integral(lambda tau: profile(tau, *a) * profile(tau, *b), min(a[0], b[0]))
    assert profile_inner_product(a, b) == pytest.approx(expected, rel=1e-12)


def test_decay_gives_the_profile_of_piecewise_constant_weights():
    gamma, steps = gamma_from_width(0.1), [0, 256, 512, 1024, 1500]
    share = np.zeros(4)
    for k, (before, after) in enumerate(itertools.pairwise(steps)):
        share *= decay(before, after, gamma)
        share[k] += 1 - decay(before, after, gamma)
    edges = (np.array(steps) / steps[-1]) ** (gamma + 1)
    np.testing.assert_allclose(share, np.diff(edges), rtol=1e-12)
    assert decay(0, 256, gamma) == 0.0


def test_a_stored_track_is_reconstructed_exactly():
    stored = [(t, gamma_from_width(w)) for t in (1000, 2000, 3000) for w in (0.05, 0.1)]
    for i, track in enumerate(stored):
        older = stored[: 2 * (i // 2) + 2]
        np.testing.assert_allclose(posthoc_coefficients(older, track), np.eye(len(older))[i], atol=1e-9)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15])
def test_posthoc_width_is_close_to_the_accumulated_average(width):
    """A drifting random walk of 2,000 steps, tracks stored 20 times; the error beside what a width changes at all."""
    steps, every, rng = 2000, 100, np.random.default_rng(0)
    path = np.cumsum(rng.standard_normal((steps, 64)), 0) * 0.02 + np.linspace(0, 1, steps)[:, None]
    widths = (0.05, 0.10, width)
    tracks, stored = {w: path[0] for w in widths}, []
    for k in range(steps):
        for w in widths:
            tracks[w] = path[k] + decay(k, k + 1, gamma_from_width(w)) * (tracks[w] - path[k])
        if (k + 1) % every == 0:
            stored += [((k + 1, gamma_from_width(w)), tracks[w]) for w in widths[:2]]
    weights = posthoc_coefficients([key for key, _ in stored], (steps, gamma_from_width(width)))
    rebuilt = sum(c * values for c, (_, values) in zip(weights, stored, strict=True))
    gap = np.abs(tracks[0.05] - tracks[0.10]).mean()
    assert np.abs(rebuilt - tracks[width]).mean() < 0.01 * gap
