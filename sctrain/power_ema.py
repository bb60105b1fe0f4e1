"""Power-function EMA: the mathematics of EDM2 (arXiv 2312.02696, section 3 and appendix C), in float64.

A track of exponent gamma at t averages the weights theta(tau), 0 <= tau <= t, with the profile (equation 121)
p_{t,gamma}(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Its relative width sigma_rel is the standard deviation of that
profile over t. Two tracks stored at several t span a space in which any other profile is found by least squares. Times
are counts of images.
"""

from collections.abc import Sequence

import numpy as np

Track = tuple[float, float]  # (images, gamma): when it was stored, and its exponent

MAX_WIDTH = 12**-0.5  # of the uniform average, gamma = 0


def gamma_from_width(sigma_rel: float) -> float:
    """Exponent of a relative width in (0, 12^-1/2): the largest real root of a cubic (equation 126)."""
    assert 0 < sigma_rel < MAX_WIDTH, f"relative width {sigma_rel} is not inside (0, {MAX_WIDTH:.4f})"
    precision = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision])
    return float(roots.real[np.abs(roots.imag) < 1e-8 * np.abs(roots)].max())


def width_from_gamma(gamma: float) -> float:
    """Relative width sigma_rel of an exponent gamma > 0 (equation 123)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def decay(images_before: int, images_after: int, gamma: float) -> float:
    """beta(t) = (1 - dt/t)^(gamma + 1) (equation 127) of the step between two counts of images; 0 at the first step."""
    assert 0 <= images_before < images_after, (images_before, images_after)
    return (images_before / images_after) ** (gamma + 1)


def profile_inner_product(a: Track, b: Track) -> float:
    """Integral of p_a(tau) p_b(tau) over the shorter of the two histories."""
    (early, gamma_early), (late, gamma_late) = sorted((a, b))
    assert early > 0, "a profile needs a history"
    scale = (gamma_early + 1) * (gamma_late + 1) / (gamma_early + gamma_late + 1)
    return scale * (early / late) ** gamma_late / late


def posthoc_coefficients(stored: Sequence[Track], target: Track) -> list[float]:
    """Weights whose sum over the stored tracks lies nearest to the target's profile, scaled to sum to one.

    The stored tracks are those at hand when the target ends: none may be younger.
    """
    gram = np.array([[profile_inner_product(a, b) for b in stored] for a in stored])
    overlap = np.array([profile_inner_product(a, target) for a in stored])
    norm = np.sqrt(np.diag(gram))  # unit profiles keep the system well scaled over a long run
    weights = np.linalg.lstsq(gram / np.outer(norm, norm), overlap / norm, rcond=None)[0] / norm
    return (weights / weights.sum()).tolist()


def unexplained(stored: Sequence[Track], target: Track, coefficients: Sequence[float]) -> float:
    """Share of the target profile's energy that the weighted sum of the stored ones misses; 0 is perfect."""
    tracks, weights = [*stored, target], np.array([*coefficients, -1.0])
    gram = np.array([[profile_inner_product(a, b) for b in tracks] for a in tracks])
    return float(weights @ gram @ weights / gram[-1, -1])
