"""Solver steps against EDM's own formulas in x_sigma, and their orders against the exact flow; in float64."""

import math

import pytest
import torch
from gaussian import Gaussian
from torch import Tensor

from sctrain.processes import T_MAX, denoise, per_sample, time_of
from sctrain.solvers import ode_step

SIGMA_DATA, B = 0.7, 16
GAUSSIAN = Gaussian.example(SIGMA_DATA)
LABELS = torch.zeros(B)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """EDM's D(x_sigma; sigma) of the Gaussian."""
    t = time_of(sigma, SIGMA_DATA)
    x_t = per_sample(t.cos(), x) * x
    return denoise(x_t, GAUSSIAN.teacher(x_t / SIGMA_DATA, t, LABELS)[0], t, SIGMA_DATA)


def edm_step(x: Tensor, sigma: Tensor, after: Tensor, *, heun: bool) -> Tensor:
    """Lines 4 to 8 of algorithm 1 of Karras et al. (2022), without churn."""
    d = (x - denoiser(x, sigma)) / per_sample(sigma, x)
    gap = per_sample(after - sigma, x)
    euler = x + gap * d
    if not heun or (after == 0).all():
        return euler
    d_after = (euler - denoiser(euler, after)) / per_sample(after, x)
    return x + gap * (d + d_after) / 2


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("share", [0.0, 0.6, 0.99])
def test_steps_are_those_of_edm(solver, share):
    sigma = torch.linspace(math.log(0.01), math.log(80), B, dtype=torch.float64).exp()
    x = torch.randn(B, *GAUSSIAN.mean.shape, dtype=torch.float64) * per_sample(1 + sigma, torch.empty(B, 1, 1, 1))
    t, s = time_of(sigma, SIGMA_DATA), time_of(share * sigma, SIGMA_DATA)
    x_s = ode_step(GAUSSIAN.teacher, per_sample(t.cos(), x) * x, t, s, (LABELS,), SIGMA_DATA, solver)
    expected = edm_step(x, sigma, share * sigma, heun=solver == "heun")
    torch.testing.assert_close(x_s / per_sample(s.cos(), x), expected, rtol=1e-9, atol=1e-11)


def test_samples_of_one_batch_may_end_at_zero_or_not():
    """Only those that end at 0 take Euler's step, also where the network says nothing finite there."""

    def undefined_at_zero(u, t, labels):
        F, w = GAUSSIAN.teacher(u, t, labels)
        return F / per_sample(t > 0, F), w

    x, t = torch.randn(B, *GAUSSIAN.mean.shape, dtype=torch.float64), torch.full((B,), 0.9, dtype=torch.float64)
    s = torch.where(torch.arange(B) % 2 == 0, 0.0, 0.5).double()
    both = ode_step(undefined_at_zero, x, t, s, (LABELS,), SIGMA_DATA, "heun")
    for solver, part in (("euler", s == 0), ("heun", s > 0)):
        alone = ode_step(GAUSSIAN.teacher, x, t, s.where(part, 0.5), (LABELS,), SIGMA_DATA, solver)
        torch.testing.assert_close(both[part], alone[part], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("t", [0.3, 0.9, 1.4])
def test_a_step_errs_by_its_length_to_the_order_plus_one(solver, order, t):
    times = torch.full((B,), t, dtype=torch.float64)
    x = torch.randn(B, *GAUSSIAN.mean.shape, dtype=torch.float64)
    errors = []
    for h in (0.01, 0.005, 0.0025):
        step = ode_step(GAUSSIAN.teacher, x, times, times - h, (LABELS,), SIGMA_DATA, solver)
        errors.append((step - GAUSSIAN.flow(x, times, times - h)).norm())
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order + 1, abs=0.1)


def test_the_closed_flow_is_a_flow():
    """What the other tests take for the truth: it composes, and its derivative is the velocity."""
    x, t = torch.randn(B, *GAUSSIAN.mean.shape, dtype=torch.float64), torch.full((B,), T_MAX, dtype=torch.float64)
    s, zero = 0.4 * t, 0 * t
    torch.testing.assert_close(GAUSSIAN.flow(GAUSSIAN.flow(x, t, s), s, zero), GAUSSIAN.flow_to_data(x, t))
    _, velocity = torch.func.jvp(lambda end: GAUSSIAN.flow(x, s, end), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(velocity, SIGMA_DATA * GAUSSIAN.teacher(x / SIGMA_DATA, s, LABELS)[0])
