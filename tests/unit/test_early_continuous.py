"""The continuous-time losses of CM 2023 in float64: limits of the discrete ones, and tangents that have a graph."""

from dataclasses import replace

import pytest
import torch
from exact import GRID, drawn, early, flipped, without_sigma_data
from test_objectives import small_network, some_draws
from torch import Tensor

from models.tangent.engines import single_pass
from models.tangent.recorded import recorded
from sctrain.objectives.base import Draws, Networks
from sctrain.objectives.discrete import DiscreteConsistency, even
from sctrain.objectives.levels import UniformPairs
from sctrain.objectives.metrics import l2
from sctrain.parameterization import Parameterization
from sctrain.processes import denoise, diffuse, jump, per_sample, sigma_of, time_of


def anchored_network():
    network = small_network()
    return network, Parameterization(0.5, sigma_min=GRID.sigma_min).of(network)


def neighbours(draws: Draws, levels: int) -> Draws:
    """The pair of times whose upper one is that of `draws`, on a grid of so many levels that has it."""
    t_sigma = sigma_of(draws.t, 0.5)
    low, high = (end ** (1 / GRID.rho) for end in (GRID.sigma_min, GRID.sigma_max))
    u = (t_sigma ** (1 / GRID.rho) - low) / (high - low)
    torch.testing.assert_close(GRID.at(u), t_sigma)
    return replace(draws, s=time_of(GRID.at(u - 1 / (levels - 1)), 0.5))


def gradient(loss: Tensor, network) -> Tensor:
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def distance_to_the_limit(distill: bool, levels: int, engine=single_pass) -> tuple[float, float]:
    """Relative distance of (N - 1)^2 times the value of CT or CD, and (N - 1) times its gradient, to the limit."""
    torch.manual_seed(14)
    network, student = anchored_network()
    draws, networks = some_draws(0.5), Networks(student, engine, small_network())
    limit = early(distill).loss(draws, networks).per_sample
    slope = gradient(limit.mean(), network)
    discrete = DiscreteConsistency(
        0.5, 10, 0.0, pairs=UniformPairs(GRID, 2), neighbour="heun" if distill else "noise", metric=l2, weight=even
    )
    loss = discrete.loss(neighbours(draws, levels), networks).per_sample
    value = (loss * (levels - 1) ** 2 - limit).norm() / limit.norm()
    return value.item(), ((gradient(loss.mean(), network) * (levels - 1) - slope).norm() / slope.norm()).item()


@pytest.mark.parametrize("distill", [True, False])
def test_discrete_losses_tend_to_the_continuous_one(distill):
    """At first order in 1 / N."""
    errors = [distance_to_the_limit(distill, levels) for levels in (1001, 2001, 4001)]
    assert max(errors[-1]) < 0.02
    for before, after in zip(errors, errors[1:], strict=False):
        assert all(1.8 < coarse / fine < 2.2 for coarse, fine in zip(before, after, strict=True))


@pytest.mark.parametrize("mutation", [flipped, without_sigma_data])
def test_discrete_losses_do_not_tend_to_a_wrong_one(mutation):
    assert distance_to_the_limit(True, 4001, single_pass)[1] < 0.02 < distance_to_the_limit(True, 4001, mutation)[1] / 2


def test_the_gradient_is_that_of_the_papers_pseudo_objective():
    """2 tau' <f, sg(df/dsigma)> / D (theorems 5 and 6), df/dsigma by forward mode through f in EDM's variables."""
    network, student = anchored_network()
    draws, teacher = some_draws(0.5), small_network()
    ours = gradient(early(True).loss(draws, Networks(student, single_pass, teacher)).per_sample.sum(), network)
    sigma = sigma_of(draws.t, 0.5)
    x = diffuse(draws.x0, draws.z, draws.t) / per_sample(draws.t.cos(), draws.x0)

    def c_in(noise):
        return per_sample((noise**2 + 0.25) ** -0.5, x)

    def f(x, noise):
        t = time_of(noise, 0.5)
        return denoise(x * c_in(noise) * 0.5, student(x * c_in(noise), t, draws.labels)[0], t, 0.5)

    F, _ = teacher(x * c_in(sigma), draws.t, draws.labels)
    denoised = denoise(x * c_in(sigma) * 0.5, F, draws.t, 0.5)
    slope = ((x - denoised) / per_sample(sigma, x)).detach()  # of the PF-ODE (Karras et al. 2022, eq. 3)
    value, df_dsigma = recorded(lambda *at: (f(*at),), (x, sigma), (slope, torch.ones_like(sigma)))
    low, high = (end ** (1 / GRID.rho) for end in (GRID.sigma_min, GRID.sigma_max))
    d_tau = GRID.rho * (high - low) * sigma ** (6 / 7)
    pseudo = 2 * d_tau * (value[0] * df_dsigma.detach()).flatten(1).mean(1)
    torch.testing.assert_close(ours, gradient(pseudo.sum(), network), rtol=1e-8, atol=1e-10)


def test_full_form_is_the_limit_of_the_loss_without_a_stopped_gradient():
    """Theorem 3: (N - 1)^2 of value and gradient, which passes through both evaluations and so through the tangent."""
    network, student = anchored_network()
    draws, teacher = some_draws(0.5), small_network().requires_grad_(False)
    limit = early(True, full=True).loss(draws, Networks(student, recorded, teacher)).per_sample
    slope, discrete = gradient(limit.mean(), network), early(True)
    x_t, errors = diffuse(draws.x0, draws.z, draws.t), []
    for levels in (2001, 4001):
        pair = neighbours(draws, levels)
        v = discrete.flow_velocity(draws, x_t / 0.5, Networks(student, recorded, teacher))
        x_s = jump(x_t, v / 0.5, pair.t, pair.s, 0.5)
        ends = [denoise(x, student(x / 0.5, t, draws.labels)[0], t, 0.5) for x, t in ((x_t, pair.t), (x_s, pair.s))]
        loss = l2(*ends) * (levels - 1) ** 2
        torch.testing.assert_close(loss, limit, rtol=0.05, atol=0)
        errors.append((gradient(loss.mean(), network) - slope).norm() / slope.norm())
    assert errors[1] < 0.02 and 1.8 < errors[0] / errors[1] < 2.2
    stopped = gradient(early(True).loss(draws, Networks(student, single_pass, teacher)).per_sample.mean(), network)
    assert (stopped - slope).norm() > 0.1 * slope.norm(), "the two forms are two"


def test_recorded_tangents_equal_the_unrecorded_and_their_gradient_the_difference():
    network, draws = small_network(), some_draws(0.5)
    u, direction = diffuse(draws.x0, draws.z, draws.t) / 0.5, (torch.randn_like(draws.x0), torch.ones_like(draws.t))
    (F, w), t_F = recorded(network, (u, draws.t), direction, draws.labels)
    (F_plain, w_plain), t_plain = single_pass(network, (u, draws.t), direction, draws.labels)
    torch.testing.assert_close([F, w, t_F], [F_plain, w_plain, t_plain], rtol=1e-10, atol=1e-12)
    parameters = list(network.parameters())
    found = torch.autograd.grad(t_F.square().mean(), parameters, allow_unused=True)
    step = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(found, step, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, step, strict=True):
                p.add_(sign * 1e-5 * d)
            ends.append(recorded(network, (u, draws.t), direction, draws.labels)[1].square().mean())
            for p, d in zip(parameters, step, strict=True):
                p.sub_(sign * 1e-5 * d)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=0)


def test_early_times_are_even_on_the_grid():
    sigma = sigma_of(drawn(early(False)).t.double(), 0.5)
    low, high = (end ** (1 / 7) for end in (GRID.sigma_min, GRID.sigma_max))
    u = ((sigma ** (1 / 7) - low) / (high - low)).sort().values
    assert (u - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov, 1 %
    torch.testing.assert_close(
        GRID.slope(GRID.at(u)), (GRID.at(u + 1e-6) - GRID.at(u - 1e-6)) / 2e-6, rtol=1e-6, atol=0
    )
