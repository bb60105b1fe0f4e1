"""Samplers against closed forms."""

import math

import pytest
import torch
from gaussian import Gaussian

from sctrain.processes import T_MAX, ModelSpace
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.sampling import consistency_sample, initial_noise, karras_times, ode_sample, step_times

LABELS = torch.zeros(64, dtype=torch.long)


def gaussian_noise(gaussian):
    return gaussian.sigma_data * torch.randn(64, *gaussian.mean.shape, dtype=torch.float64)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_ode_samplers_converge_at_their_order(solver, order):
    gaussian = Gaussian.example(0.5)
    noise = gaussian_noise(gaussian)
    exact = gaussian.flow_to_data(noise, torch.full((64,), T_MAX, dtype=torch.float64))
    errors = [(ode_sample(gaussian.teacher, noise, LABELS, 0.5, n, solver) - exact).norm() for n in (32, 64, 128)]
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert abs(rates[1] - order) < 0.25, rates


def test_one_step_of_the_exact_student_solves_the_flow():
    gaussian = Gaussian.example(0.5)
    noise = gaussian_noise(gaussian)
    x = consistency_sample(gaussian.student, noise, LABELS, 0.5, step_times(1), 0, torch.arange(64))
    torch.testing.assert_close(x, gaussian.flow_to_data(noise, torch.full((64,), T_MAX, dtype=torch.float64)))


def test_multistep_of_the_exact_student_keeps_the_distribution():
    gaussian = Gaussian.example(0.5)
    n = 20_000
    noise = 0.5 * torch.randn(n, *gaussian.mean.shape, dtype=torch.float64)
    labels = torch.zeros(n, dtype=torch.long)
    x = consistency_sample(gaussian.student, noise, labels, 0.5, step_times(4), 0, torch.arange(n))
    torch.testing.assert_close(x.mean(0), gaussian.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(0), gaussian.std, rtol=0.04, atol=0)


def test_times():
    assert step_times(1) == [T_MAX] and step_times(2) == [T_MAX, 1.1]
    assert step_times(3) == pytest.approx([T_MAX, 1.1, 0.55])
    times = karras_times(18, 0.5)
    assert len(times) == 19 and times[0] == pytest.approx(T_MAX) and times[-1] == 0
    assert 0.5 * math.tan(times[17]) == pytest.approx(0.002)
    assert all(a > b for a, b in zip(times[:-1], times[1:], strict=True))


def test_noise_belongs_to_the_image_not_to_the_batch():
    whole = initial_noise(5, torch.arange(7), (1, 2, 2), 0.5)
    assert torch.equal(whole[3:5], initial_noise(5, torch.tensor([3, 4]), (1, 2, 2), 0.5))
    assert not torch.equal(whole, initial_noise(6, torch.arange(7), (1, 2, 2), 0.5))
    other = SampleGenerator(5, torch.arange(7), Purpose.FRESH_NOISE).normal((1, 2, 2))
    assert not torch.equal(whole, 0.5 * other)
    assert initial_noise(0, torch.arange(4000), (4,), 0.5).std().item() == pytest.approx(0.5, rel=0.03)


def test_model_space_round_trip():
    space = ModelSpace((0.3,), (0.37,), 0.5)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = space.from_pixels(pixels)
    assert torch.equal(space.to_pixels(x), pixels)
    assert x[0, 0, 0, 0].item() == pytest.approx(-0.3 * 0.5 / 0.37)
