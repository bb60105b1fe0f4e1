"""Theorems of the consistency papers as orders of convergence, in float64 and without sampling."""

import math

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from torch import Tensor

from models.tangent.engines import single_pass
from sctrain.objectives.base import Draws, Networks
from sctrain.objectives.discrete import DiscreteConsistency, even
from sctrain.objectives.levels import Grid, UniformPairs
from sctrain.objectives.metrics import elementwise_huber, l2, pseudo_huber
from sctrain.processes import per_sample, time_of
from sctrain.solvers import ode_step

SIGMA_DATA = 0.7
GAUSSIAN = Gaussian.example(SIGMA_DATA)
PIXEL = Gaussian(GAUSSIAN.mean[:, :1, :1], GAUSSIAN.std[:, :1, :1], SIGMA_DATA)


def discrete(neighbour, metric=l2) -> DiscreteConsistency:
    pairs = UniformPairs(Grid(), 18)
    return DiscreteConsistency(SIGMA_DATA, 10, 0.0, pairs=pairs, neighbour=neighbour, metric=metric, weight=even)


def network_of(f):
    """F of a consistency function f(x_t, t)."""

    def network(u: Tensor, t: Tensor, labels) -> tuple[Tensor, Tensor]:
        x, t4 = SIGMA_DATA * u, per_sample(t, u)
        return (t4.cos() * x - f(x, t)) / (t4.sin() * SIGMA_DATA), torch.zeros_like(t)

    return network


class FixedPoint:
    """What CD with a solver converges to on N levels: f(x, t_n+1) = f(step(x), t_n), f(x, t_1) = x / cos t_1.

    For a Gaussian it is affine in every pixel; its two coefficients follow level by level from one step of two points.
    """

    def __init__(self, levels: int, solver):
        self.t = time_of(Grid().levels(levels), SIGMA_DATA)
        self.slope, self.offset = [(1 / self.t[0].cos()).expand_as(GAUSSIAN.mean)], [torch.zeros_like(GAUSSIAN.mean)]
        points = torch.stack([torch.zeros_like(GAUSSIAN.mean), torch.ones_like(GAUSSIAN.mean)])
        for s, t in zip(self.t[:-1], self.t[1:], strict=True):
            labels = torch.zeros(2)
            zero, one = ode_step(GAUSSIAN.teacher, points, t.repeat(2), s.repeat(2), (labels,), SIGMA_DATA, solver)
            self.offset.append(self.offset[-1] + self.slope[-1] * zero)
            self.slope.append(self.slope[-1] * (one - zero))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        index = (t[:, None] - self.t).abs().argmin(1)
        return torch.stack(self.offset)[index] + torch.stack(self.slope)[index] * x


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The consistency function with its boundary at sigma_min."""
    least = time_of(torch.tensor(0.002, dtype=torch.float64), SIGMA_DATA).expand_as(t)
    return GAUSSIAN.flow(x, t, least) / per_sample(least.cos(), x)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_theorem_1_of_cm_2023(solver, order):
    """Where the CD loss is zero, the error sup |f - f_exact| over levels falls as the gap to the solver's order."""
    errors, noise = [], torch.randn(1, *GAUSSIAN.mean.shape, dtype=torch.float64)
    for gaps in (64, 128, 256):
        f = FixedPoint(gaps + 1, solver)
        t, x = f.t[1:], noise * per_sample(f.t[1:].sin() + 0.3, noise)
        zeros = torch.zeros(gaps)
        draws = Draws(0 * x, x / per_sample(t.sin(), x), t, zeros, s=f.t[:-1])
        networks = Networks(network_of(f), single_pass, GAUSSIAN.teacher)
        assert discrete(solver).loss(draws, networks).per_sample.max() < 1e-20
        errors.append((f(x, t) - exact(x, t)).abs().max())
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.15)


def quadrature(t: float, s: float) -> tuple[Draws, Tensor]:
    """All pairs of Gauss-Hermite nodes of x0 and z for data of one pixel, and their weights, which add to 1."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    x0, z = torch.meshgrid(PIXEL.mean.flatten() + PIXEL.std.flatten() * nodes, SIGMA_DATA * nodes, indexing="ij")
    both = torch.outer(weights, weights).flatten() / (2 * math.pi)
    times = torch.full_like(both, t)
    x0, z = (values.reshape(-1, 1, 1, 1) for values in (x0, z))
    return Draws(x0, z, times, torch.zeros_like(times), s=torch.full_like(times, s)), both


def student(u: Tensor, t: Tensor, labels) -> tuple[Tensor, Tensor]:
    return (1.3 * u + per_sample(t, u)).sin(), torch.zeros_like(t)


def target(u: Tensor, t: Tensor, labels) -> tuple[Tensor, Tensor]:
    """Another network: with theta- = theta both losses are O(dt^2), and would agree to o(dt) whatever the score."""
    return (0.8 * u - per_sample(t, u)).cos(), torch.zeros_like(t)


def metric(name: str):
    return {"l2": l2, "pseudo_huber": lambda x, y: pseudo_huber(x, y, 0.3)}.get(
        name, lambda x, y: elementwise_huber(x, y, 0.3)
    )


@pytest.mark.parametrize("name", ["l2", "pseudo_huber", "huber"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_theorem_2_of_cm_2023(name, solver):
    """L_CD - L_CT = o(dt) for the exact score, here dt^2; for another score it is of the order of dt."""
    other = Gaussian(PIXEL.mean, 1.5 * PIXEL.std, SIGMA_DATA)

    def rate(teacher) -> float:
        differences = []
        for h in (0.008, 0.004):
            draws, weights = quadrature(0.9, 0.9 - h)
            networks = Networks(student, single_pass, teacher, target)
            cd, ct = (discrete(n, metric(name)).loss(draws, networks).per_sample @ weights for n in (solver, "noise"))
            differences.append((cd - ct).abs())
        assert differences[1] > 1e-8, "the quadrature is exact to less"
        return math.log2(differences[0] / differences[1])

    assert rate(PIXEL.teacher) == pytest.approx(2, abs=0.1)
    assert rate(other.teacher) == pytest.approx(1, abs=0.1)


class Toy:
    """iCT's toy (section 3.2): x0 = xi, and f_theta(x, sigma) = (sigma_min / sigma) x + (1 - sigma_min / sigma) theta.

    With theta = xi it is the consistency function of sigma_min = 0.5.
    """

    xi, least, sigma = 0.4, 0.5, 2.0

    def f(self, theta: Tensor):
        def f(x: Tensor, t: Tensor) -> Tensor:
            share = per_sample(self.least / (SIGMA_DATA * t.tan()), x)
            return share * x / per_sample(t.cos(), x) + (1 - share) * theta

        return network_of(f)

    def gradient_over_gap(self, theta: float, theta_target: float, gap: float) -> float:
        """(dL_CT / dtheta) / dsigma at one level, of the real loss with its target network."""
        times = (time_of(torch.full((5,), sigma).double(), SIGMA_DATA) for sigma in (self.sigma + gap, self.sigma))
        t, s = times
        z = SIGMA_DATA * torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(-1, 1, 1, 1)
        draws = Draws(torch.full_like(z, self.xi), z, t, torch.zeros(5), s=s)
        free = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        lagging = self.f(torch.tensor(theta_target, dtype=torch.float64))
        loss = discrete("noise").loss(draws, Networks(self.f(free), single_pass, target=lagging)).per_sample.mean()
        (gradient,) = torch.autograd.grad(loss, free)
        return gradient.item() / gap

    def limit(self, theta: float) -> float:
        """2 (sigma_min / sigma^2) (1 - sigma_min / sigma) (theta - xi)."""
        share = self.least / self.sigma
        return 2 * share / self.sigma * (1 - share) * (theta - self.xi)


@pytest.mark.parametrize("theta", [0.1, 0.9])
def test_proposition_1_of_ict_without_an_average_the_gradient_points_at_the_data(theta):
    toy = Toy()
    errors = [abs(toy.gradient_over_gap(theta, theta, gap) / toy.limit(theta) - 1) for gap in (0.02, 0.01)]
    assert errors[1] < 0.01 and math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)
    assert toy.limit(theta) * (theta - toy.xi) > 0


@pytest.mark.parametrize("theta", [0.1, 0.9])
@pytest.mark.parametrize("lag", [0.05, -0.05])
def test_proposition_1_of_ict_with_an_average_it_points_at_the_average_and_diverges(theta, lag):
    """Whichever side the data are on: that is why the target's average goes (mu = 0)."""
    small, smaller = (Toy().gradient_over_gap(theta, theta + lag, gap) for gap in (0.002, 0.001))
    assert small * -lag > 0 and smaller / small == pytest.approx(2, abs=0.1)
    assert abs(smaller) > 50 * abs(Toy().limit(theta))
