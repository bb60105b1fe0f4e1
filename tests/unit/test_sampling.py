"""Samplers against closed forms."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from gaussian import Gaussian
from torch import Tensor

from sctrain.objectives.levels import ddim_times
from sctrain.processes import T_MAX, ModelSpace, per_sample, sigma_of
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.sampling import (
    consistency_sample,
    edm_sample,
    even_times,
    greedy_times,
    initial_noise,
    jump_sample,
    karras_times,
    lcm_times,
    noised,
    ode_sample,
    step_times,
    ternary_search,
    trigflow_network,
)

SIGMA_DATA = 0.5
GAUSSIAN = Gaussian.example(SIGMA_DATA)
LABELS = (torch.zeros(64, dtype=torch.long),)
INDICES = torch.arange(64)


def gaussian_noise(count: int = 64) -> Tensor:
    return SIGMA_DATA * torch.randn(count, *GAUSSIAN.mean.shape, dtype=torch.float64)


def flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the probability-flow ODE takes x from t to s."""
    t, s = per_sample(t, x), per_sample(s, x)
    return s.cos() * GAUSSIAN.mean + (GAUSSIAN.variance(s) / GAUSSIAN.variance(t)).sqrt() * (
        x - t.cos() * GAUSSIAN.mean
    )


def solution(x: Tensor, start: float = T_MAX) -> Tensor:
    return GAUSSIAN.flow_to_data(x, torch.full((len(x),), start, dtype=x.dtype))


def exact_jumps(u: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None, end: Tensor) -> tuple[Tensor, Tensor]:
    """F whose jump from t to `end` is the flow's: what CTM, and multistep sCD, converge to."""
    assert guidance is None
    x, gap = SIGMA_DATA * u, per_sample(t - end, u)
    return (gap.cos() * x - flow(x, t, end)) / (gap.sin() * SIGMA_DATA), torch.zeros_like(t)


def evenly_jumping(steps: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """What progressive distillation into N steps converges to: a jump of T_MAX / N, without being told so."""
    return lambda u, t, labels: exact_jumps(u, t, labels, None, t - T_MAX / steps)


def anchored(sigma_min: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """F whose consistency function stops at `sigma_min`, in EDM's variables (CM 2023)."""

    def network(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x, end = SIGMA_DATA * u, torch.full_like(t, math.atan(sigma_min / SIGMA_DATA))
        f = flow(x, t, end) / per_sample(end.cos(), x)
        return (per_sample(t.cos(), x) * x - f) / (per_sample(t.sin(), x) * SIGMA_DATA), torch.zeros_like(t)

    return network


def denoiser(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """E[x0 | x] for EDM's x = x0 + sigma eps."""
    s2, std2 = per_sample(sigma, x) ** 2, GAUSSIAN.std**2
    return (std2 * x + s2 * GAUSSIAN.mean) / (std2 + s2)


# Teachers


def order(solver: str, times: Callable[[int], list[float]]) -> float:
    noise = gaussian_noise()
    exact = None
    errors = []
    for steps in (64, 128, 256):
        grid = times(steps)
        start, end = (torch.full((64,), at, dtype=torch.float64) for at in (grid[0], grid[-1]))
        exact = flow(noise, start, end)
        found = ode_sample(GAUSSIAN.teacher, noise, LABELS, SIGMA_DATA, steps, solver, grid)  # type: ignore[arg-type]
        errors.append((found - exact).norm().item())
    return math.log2(errors[1] / errors[2])


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("heun", 2), ("dpm", 2)])
def test_ode_samplers_converge_at_their_order(solver: str, expected: int):
    """Also to t = 0, where the last step is Euler's from a level that is small enough."""
    assert order(solver, lambda steps: karras_times(steps, SIGMA_DATA)[:-1]) == pytest.approx(expected, abs=0.15)
    to_data = order(solver, lambda steps: karras_times(steps, SIGMA_DATA, sigma_min=1e-5))
    assert to_data == pytest.approx(expected, abs=0.25)


def edm_reference(x: Tensor, sigmas: list[float], solver: str) -> Tensor:
    """The papers' own loops, in EDM's variables and nothing else."""
    before: tuple[float, Tensor] | None = None
    for sigma, goal in pairwise(sigmas):
        D = denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype), LABELS[0])
        slope, ratio = (x - D) / sigma, goal / sigma
        if solver == "dpm" and goal > 0:
            h, guess = math.log(sigma / goal), D
            if before is not None:
                r = math.log(before[0] / sigma) / h
                guess = (1 + 1 / (2 * r)) * D - 1 / (2 * r) * before[1]
            before = (sigma, D)
            x = ratio * x + (1 - ratio) * guess
            continue
        proposed = x + (goal - sigma) * slope
        if solver == "heun" and goal > 0:
            there = (proposed - denoiser(proposed, torch.full((len(x),), goal, dtype=x.dtype), LABELS[0])) / goal
            proposed = x + (goal - sigma) * (slope + there) / 2
        x = proposed
    return x


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
def test_edm_and_trigflow_variables_agree(solver: Any):
    times = karras_times(12, SIGMA_DATA)
    sigmas = [SIGMA_DATA * math.tan(time) for time in times]
    noise = gaussian_noise()
    x = noise / math.cos(times[0])
    expected = edm_reference(x, sigmas, solver)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(edm_sample(denoiser, x, LABELS, SIGMA_DATA, sigmas, solver), expected)
    close(ode_sample(GAUSSIAN.teacher, noise, LABELS, SIGMA_DATA, 12, solver), expected)
    stop = edm_sample(denoiser, x, LABELS, SIGMA_DATA, sigmas[:-2], solver)  # at a level above 0: x_t is x_sigma cos t
    close(stop, edm_reference(x, sigmas[:-2], solver))


def test_a_denoiser_is_the_network_that_it_belongs_to():
    u, t = gaussian_noise() / SIGMA_DATA, torch.linspace(0.01, T_MAX, 64, dtype=torch.float64)
    F, _ = trigflow_network(denoiser, SIGMA_DATA)(u, t, *LABELS)
    torch.testing.assert_close(F, GAUSSIAN.teacher(u, t, *LABELS)[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("heun", 9), ("dpm", 5)])
def test_solvers_ask_as_often_as_they_say(solver: Any, evaluations: int):
    calls: list[float] = []

    def network(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(t[0].item())
        return GAUSSIAN.teacher(u, t, labels)

    ode_sample(network, gaussian_noise(), LABELS, SIGMA_DATA, 5, solver)
    assert len(calls) == evaluations and min(calls) > 0, "at t = 0 EDM's ln sigma is not finite"


# Students


def test_one_step_of_the_exact_student_solves_the_flow():
    noise = gaussian_noise()
    x = consistency_sample(GAUSSIAN.student, noise, LABELS, SIGMA_DATA, step_times(1), 0, INDICES)
    torch.testing.assert_close(x, solution(noise), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", ["multistep", "anchored", "gamma"])
def test_samplers_of_exact_students_keep_the_distribution(sampler: str):
    """Every re-noising puts the right amount of noise: mean and variance stay within five standard errors."""
    n, sigma_min = 20_000, 0.4  # a coarse anchor, so that noise of the wrong level shows
    noise, indices, labels = gaussian_noise(n), torch.arange(n), (torch.zeros(n, dtype=torch.long),)
    variance = GAUSSIAN.std**2
    if sampler == "gamma":
        x = jump_sample(exact_jumps, noise, labels, SIGMA_DATA, [*step_times(4), 0.0], 0, indices, 0.6)
    elif sampler == "anchored":
        times = step_times(3, middle_time=1.4)
        x = consistency_sample(anchored(sigma_min), noise, labels, SIGMA_DATA, times, 0, indices, sigma_min)
        variance = variance + sigma_min**2
    else:
        x = consistency_sample(GAUSSIAN.student, noise, labels, SIGMA_DATA, step_times(4), 0, indices)
    # Noise at T_MAX instead of the data's own marginal there leaves 1e-4 of the width: below what is tested.
    assert ((x.mean(0) - GAUSSIAN.mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x.var(0) - variance).abs() < 5 * variance * (2 / n) ** 0.5).all()


def test_noise_above_the_anchor():
    """EDM's x + sqrt(tau^2 - e^2) eps, times cos t."""
    x, eps, t, e = gaussian_noise(), torch.randn(64, 1, 2, 3, dtype=torch.float64), 0.7, 0.1
    tau = SIGMA_DATA * math.tan(t)
    expected = math.cos(t) * (x + math.sqrt(tau**2 - e**2) * eps)
    torch.testing.assert_close(noised(x, SIGMA_DATA * eps, t, SIGMA_DATA, e), expected, rtol=1e-12, atol=1e-12)
    plain = math.cos(t) * x + math.sin(t) * SIGMA_DATA * eps
    torch.testing.assert_close(noised(x, SIGMA_DATA * eps, t, SIGMA_DATA), plain, rtol=1e-12, atol=1e-12)


def imperfect(u: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None, end: Tensor) -> tuple[Tensor, Tensor]:
    """A network for which it matters where a jump ends."""
    return torch.sin(3 * u) * per_sample(1 + t + end**2, u), torch.zeros_like(t)


def test_gamma_one_is_multistep_sampling():
    def to_data(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return imperfect(u, t, labels, None, torch.zeros_like(t))

    noise, times = gaussian_noise(), step_times(3)
    multistep = consistency_sample(to_data, noise, LABELS, SIGMA_DATA, times, 0, INDICES)
    jumps = jump_sample(imperfect, noise, LABELS, SIGMA_DATA, [*times, 0.0], 0, INDICES, 1.0)
    torch.testing.assert_close(jumps, multistep, rtol=1e-12, atol=1e-12)


def test_gamma_zero_is_deterministic_and_follows_the_flow():
    noise, times = gaussian_noise(), [*step_times(3), 0.0]
    one, two = (jump_sample(imperfect, noise, LABELS, SIGMA_DATA, times, seed, INDICES) for seed in (0, 1))
    assert torch.equal(one, two)
    one, two = (jump_sample(imperfect, noise, LABELS, SIGMA_DATA, times, seed, INDICES, 0.5) for seed in (0, 1))
    assert not torch.allclose(one, two)
    exact = jump_sample(exact_jumps, noise, LABELS, SIGMA_DATA, times, 0, INDICES)
    torch.testing.assert_close(exact, solution(noise), rtol=1e-11, atol=1e-11)


def test_the_network_is_told_where_each_jump_ends():
    told: list[tuple[float, float]] = []

    def network(u: Tensor, t: Tensor, labels: Tensor, scale: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        assert (scale == 2).all()
        told.append((t[0].item(), end[0].item()))
        return u, t

    conditions = (*LABELS, torch.full((64,), 2.0))
    jump_sample(network, gaussian_noise(), conditions, SIGMA_DATA, even_times(3), 0, INDICES)
    assert told == [pytest.approx(pair) for pair in pairwise([T_MAX, T_MAX * 2 / 3, T_MAX / 3, 0.0])]


@pytest.mark.parametrize("steps", [1, 4])
def test_exact_progressive_jumps_solve_the_flow(steps: int):
    noise = gaussian_noise()
    network, times = evenly_jumping(steps), even_times(steps)
    x = jump_sample(network, noise, LABELS, SIGMA_DATA, times, 0, INDICES, told_the_end=False)
    torch.testing.assert_close(x, solution(noise), rtol=1e-11, atol=1e-11)


# Times


def test_times():
    assert step_times(1) == [T_MAX] and step_times(2) == [T_MAX, 1.1]
    assert step_times(3) == pytest.approx([T_MAX, 1.1, 0.55])
    assert step_times(2, start=1.0) == pytest.approx([1.0, 1.1 * 2 / math.pi])
    times = karras_times(18, SIGMA_DATA)
    assert len(times) == 19 and times[0] == pytest.approx(T_MAX) and times[-1] == 0
    assert SIGMA_DATA * math.tan(times[17]) == pytest.approx(0.002)
    high, low = ((SIGMA_DATA * math.tan(T_MAX)) ** (1 / 7), 0.002 ** (1 / 7))
    assert SIGMA_DATA * math.tan(times[1]) == pytest.approx((high + (low - high) / 17) ** 7)
    assert all(a > b for a, b in pairwise(times))
    assert karras_times(1, SIGMA_DATA) == pytest.approx([T_MAX, 0])
    early = karras_times(4, SIGMA_DATA, start=math.atan(2.0))  # a process that ends at sigma = 1
    sigmas = [SIGMA_DATA * math.tan(time) for time in early]
    assert early[0] == math.atan(2.0) and [sigma ** (1 / 7) for sigma in sigmas[1:3]] == pytest.approx(
        [1 + i / 3 * (0.002 ** (1 / 7) - 1) for i in (1, 2)]
    )
    assert sigmas[3:] == pytest.approx([0.002, 0])
    assert even_times(2) == [T_MAX, T_MAX / 2, 0]


def test_lcm_takes_even_steps_of_its_training_times():
    """Steps 999, 759 (of 50 the 12th below), 499, 259 of the process."""
    trained = ddim_times(50)
    alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    assert lcm_times(50, 4) == pytest.approx([math.acos(alpha[step]) for step in (999, 759, 499, 259)])
    assert lcm_times(50, 50) == pytest.approx(trained[1:].flip(0).tolist())
    assert lcm_times(50, 1) == [trained[-1].item()] and sigma_of(trained[-1:], SIGMA_DATA) > 7


def test_ternary_search_finds_the_minimum():
    tried: list[float] = []
    found = ternary_search(lambda x: (tried.append(x), (x - 0.37) ** 2)[1], 0.0, 1.0, 12)
    assert found.at == pytest.approx(0.37, abs=(2 / 3) ** 12) and found.score == (found.at - 0.37) ** 2
    assert len(tried) == 24 and min(tried) > 0 and max(tried) < 1


def test_times_are_found_one_after_the_other():
    """The second is the best of two steps, although another would be better once there is a third."""
    best = (0.9, 0.4)

    def score(times: Any) -> float:
        return sum((time - goal) ** 2 for time, goal in zip(times[1:], best, strict=False)) + 1 / len(times)

    times, value = greedy_times(score, T_MAX, 3, 15, low=0.01)
    assert times == [T_MAX, pytest.approx(0.9, abs=0.01), pytest.approx(0.4, abs=0.01)]
    assert value == score(times)
    assert greedy_times(score, T_MAX, 1, 15) == ([T_MAX], 1.0)


# Randomness


def test_noise_belongs_to_the_image_not_to_the_batch():
    whole = initial_noise(5, torch.arange(7), (1, 2, 2), 0.5)
    assert torch.equal(whole[3:5], initial_noise(5, torch.tensor([3, 4]), (1, 2, 2), 0.5))
    assert not torch.equal(whole, initial_noise(6, torch.arange(7), (1, 2, 2), 0.5))
    other = SampleGenerator(5, torch.arange(7), Purpose.FRESH_NOISE).normal((1, 2, 2))
    assert not torch.equal(whole, 0.5 * other)
    assert initial_noise(0, torch.arange(4000), (4,), 0.5).std().item() == pytest.approx(0.5, rel=0.03)


SAMPLERS: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]] = {
    "multistep": lambda z, i, c: consistency_sample(GAUSSIAN.student, z, c, SIGMA_DATA, step_times(3), 1, i),
    "anchored": lambda z, i, c: consistency_sample(anchored(0.1), z, c, SIGMA_DATA, step_times(3), 1, i, 0.1),
    "lcm": lambda z, i, c: consistency_sample(GAUSSIAN.student, z, c, SIGMA_DATA, lcm_times(50, 4), 1, i),
    "gamma": lambda z, i, c: jump_sample(imperfect, z, c, SIGMA_DATA, [*step_times(3), 0.0], 1, i, 0.5),
    "jumps": lambda z, i, c: jump_sample(imperfect, z, c, SIGMA_DATA, even_times(3), 1, i),
    "euler": lambda z, i, c: ode_sample(GAUSSIAN.teacher, z, c, SIGMA_DATA, 5, "euler"),
    "heun": lambda z, i, c: ode_sample(GAUSSIAN.teacher, z, c, SIGMA_DATA, 5, "heun"),
    "dpm": lambda z, i, c: ode_sample(GAUSSIAN.teacher, z, c, SIGMA_DATA, 5, "dpm"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_how_a_batch_is_split(name: str):
    """In float32, where batches of other sizes may round otherwise: to 1e-5."""

    def draw(indices: Tensor) -> Tensor:
        noise = initial_noise(1, indices, GAUSSIAN.mean.shape, SIGMA_DATA)
        x = SAMPLERS[name](noise, indices, (torch.zeros(len(indices), dtype=torch.long),))
        assert torch.equal(SAMPLERS[name](noise, indices, (torch.zeros(len(indices), dtype=torch.long),)), x)
        return x

    whole = draw(torch.arange(10))
    for sizes in ([3, 7], [1] * 10):
        parts = torch.cat([draw(part) for part in torch.arange(10).split(sizes)])
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])


def test_model_space_round_trip():
    space = ModelSpace((0.3,), (0.37,), 0.5)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = space.from_pixels(pixels)
    assert torch.equal(space.to_pixels(x), pixels)
    assert x[0, 0, 0, 0].item() == pytest.approx(-0.3 * 0.5 / 0.37)
