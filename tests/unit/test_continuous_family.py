"""The continuous-time family and its discrete twins in float64, at the exact solution for Gaussian data and beside."""

from dataclasses import replace

import pytest
import torch
from exact import GRID, SEGMENTS, Exact, drawn, early, flipped, gaussian_draws, lower_ends, twin, without_sigma_data
from gaussian import Gaussian
from test_objectives import SHAPE, B, consistency, small_network, some_draws
from torch import Tensor

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import finite_difference, single_pass
from models.tangent.recorded import recorded
from sctrain.objectives.base import Draws, Networks
from sctrain.objectives.continuous import ContinuousConsistency, consistency_tangent
from sctrain.objectives.drawing import l2_norm
from sctrain.objectives.levels import FromData, lognormal_cells
from sctrain.objectives.twins import difference
from sctrain.parameterization import Parameterization
from sctrain.processes import T_MAX, denoise, diffuse, jump, per_sample, time_of, velocity

# --- At the exact consistency function ------------------------------------------------------------------------------


def worst(name: str, sigma_data: float, engine=single_pass, r: float = 1.0) -> tuple[float, float]:
    """Largest and least norm of the samples' tangents at the exact solution, along the marginal velocity."""
    torch.manual_seed(11)
    gaussian = Gaussian.example(sigma_data)
    exact, draws = Exact(gaussian), gaussian_draws(gaussian, r=r)
    if name == "cd_continuous":
        student = Parameterization(sigma_data, sigma_min=GRID.sigma_min).of(exact.anchored)
        loss = early(True, sigma_data).loss(draws, Networks(student, engine, gaussian.teacher))
    elif name == "scd":
        loss = consistency(sigma_data, True).loss(draws, Networks(gaussian.student, engine, gaussian.teacher))
    else:
        objective, draws = consistency(sigma_data, True, segments=SEGMENTS), replace(draws, s=lower_ends(draws.t))
        loss = objective.loss(draws, Networks(exact.to_the_end, engine, gaussian.teacher))
    norms = loss.diagnostics["tangent_norm"]
    assert len(norms) == B
    return norms.max().item(), norms.min().item()


TANGENT_METHODS = ["scd", "scd in segments", "cd_continuous"]


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("name", TANGENT_METHODS)
def test_tangents_vanish_at_the_exact_solution(name, sigma_data):
    assert worst(name, sigma_data)[0] < 1e-9


@pytest.mark.parametrize("mutation", [flipped, without_sigma_data])
@pytest.mark.parametrize("name", TANGENT_METHODS)
def test_a_wrong_tangent_does_not_vanish_there(name, mutation):
    assert worst(name, 0.5, mutation)[1] > 1e-3


@pytest.mark.parametrize("name", TANGENT_METHODS[:2])
def test_a_part_of_the_tangent_does_not_vanish_there(name):
    assert worst(name, 0.5, r=0.5)[1] > 1e-3


def test_a_segment_that_is_told_another_end_does_not_vanish():
    gaussian = Gaussian.example(0.5)
    draws = gaussian_draws(gaussian)
    draws = replace(draws, s=0.9 * lower_ends(draws.t).clamp_min(0.1))
    networks = Networks(
        lambda u, t, labels, w, end: Exact(gaussian).to_the_end(u, t, labels, w, lower_ends(t)),
        finite_difference,  # rounding to the lower end has no tangent
        gaussian.teacher,
    )
    loss = consistency(0.5, True, segments=SEGMENTS).loss(draws, networks)
    assert loss.diagnostics["tangent_norm"].min() > 1e-3


def residual_of_the_twin(gap: float, step_factor: float = 1.0) -> Tensor:
    """Norms of the difference quotient at the exact solution, which ends on the teacher's straight step."""
    torch.manual_seed(12)
    gaussian = Gaussian.example(0.5)
    draws = gaussian_draws(gaussian, s=gap)

    def teacher(u, t, labels):
        F, w = gaussian.teacher(u, t, labels)
        return step_factor * F, w

    loss = twin(True).loss(draws, Networks(gaussian.student, single_pass, teacher))
    return loss.diagnostics["tangent_norm"]


def test_the_twins_residual_vanishes_with_the_gap_at_the_exact_solution():
    """A straight step misses the trajectory by O(gap^2), so the quotient by O(gap), and by no less."""
    coarse, fine = residual_of_the_twin(2e-3), residual_of_the_twin(1e-3)
    assert fine.max() < 3e-2 and (coarse / fine - 2).abs().max() < 0.02
    assert residual_of_the_twin(1e-3, step_factor=-1.0).min() > 0.05
    assert residual_of_the_twin(1e-3, step_factor=2.0).min() > 0.05


# --- Along the velocity of the sample itself ------------------------------------------------------------------------


def posterior(gaussian: Gaussian, x_t: Tensor, t: Tensor, count: int) -> Draws:
    """`count` draws of (x0, z) given x_t at one time: all of them pass through this very point."""
    sin, cos, variance = t.sin(), t.cos(), gaussian.variance(t)
    mean = gaussian.mean + cos * gaussian.std**2 / variance * (x_t - cos * gaussian.mean)
    deviation = gaussian.std * gaussian.sigma_data * sin / variance.sqrt()
    x0 = mean + deviation * torch.randn(count, *x_t.shape, dtype=torch.float64)
    return Draws(x0, (x_t - cos * x0) / sin, t.repeat(count), torch.zeros(count, dtype=torch.long))


def mean_over_error(tangents: Tensor, expected: Tensor | float = 0.0) -> float:
    error = tangents.std(0) / len(tangents) ** 0.5
    return ((tangents - expected).mean(0) / error).abs().max().item()


@pytest.mark.parametrize("name", ["sct", "ct_continuous", "sct_discrete"])
def test_only_the_conditional_mean_of_the_tangent_vanishes(name):
    """Given x_t. The twin's mean is the teacher's difference at the same gap, for f is linear in x here."""
    torch.manual_seed(13)
    gaussian, count = Gaussian.example(0.5), 20_000
    exact, t = Exact(gaussian), torch.tensor(0.7, dtype=torch.float64)
    x_t = gaussian.mean + torch.randn_like(gaussian.mean)
    draws, expected = posterior(gaussian, x_t, t, count), torch.zeros_like(x_t)
    torch.testing.assert_close(diffuse(draws.x0, draws.z, draws.t), x_t.expand(count, *x_t.shape))
    networks = Networks(gaussian.student, single_pass, gaussian.teacher)
    if name == "sct":
        tangents = consistency(0.5, False).evaluate(draws, networks).g
    elif name == "ct_continuous":
        student = Parameterization(0.5, sigma_min=GRID.sigma_min).of(exact.anchored)
        _, tangents = early(False).evaluate(draws, Networks(student, single_pass))
    else:
        draws = replace(draws, s=draws.t - 0.05)
        tangents = twin(False).evaluate(draws, networks).g
        one = Draws(*(getattr(draws, key)[:1] for key in ("x0", "z", "t", "labels")), s=draws.s[:1])
        expected = twin(True).evaluate(one, networks).g[0]
        assert mean_over_error(tangents) > 10, "a gap of 0.05 shows"
    assert mean_over_error(tangents, expected) < 4
    assert (tangents.abs().mean(0) > 30 * (tangents.mean(0) - expected).abs()).all(), "per sample it is not zero"
    assert mean_over_error(tangents + 0.1 * tangents.std(0), expected) > 4, "a tenth of its spread would be seen"


# --- Twins and their limit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("distill", [True, False])
def test_delta_is_the_exact_difference_quotient(sigma_data, distill):
    network, teacher, draws = small_network(), small_network(), some_draws(sigma_data)
    draws = replace(draws, s=draws.t * torch.linspace(0, 0.95, B, dtype=torch.float64))  # the first ends on the data
    networks = Networks(network, single_pass, teacher)
    g = twin(distill, sigma_data).evaluate(draws, networks).g
    x_t, t, s = diffuse(draws.x0, draws.z, draws.t), draws.t, draws.s
    dx_dt = sigma_data * teacher(x_t / sigma_data, t, draws.labels)[0].detach()
    x_s = jump(x_t, dx_dt / sigma_data, t, s, sigma_data) if distill else diffuse(draws.x0, draws.z, s)

    def f(x, time):
        return denoise(x, network(x / sigma_data, time, draws.labels)[0], time, sigma_data).detach()

    quotient = (f(x_t, t) - f(x_s, s)) / per_sample((t - s).sin(), x_t)
    torch.testing.assert_close(g, per_sample(t.cos(), g) * quotient, rtol=1e-12, atol=1e-12)
    cold = twin(distill, sigma_data).evaluate(replace(draws, r=0.0), networks)
    velocity_t = dx_dt if distill else velocity(draws.x0, draws.z, t)
    expected = -per_sample(t.cos() * s.cos(), g) * (sigma_data * cold.F.detach() - velocity_t)
    torch.testing.assert_close(cold.g, expected, rtol=1e-12, atol=1e-12)


def test_a_difference_that_ends_on_the_data_is_finite_where_networks_are_told_log_sigma():
    network, draws = small_network().float(), some_draws(0.5)
    draws = Draws(draws.x0.float(), draws.z.float(), draws.t.float(), draws.labels, s=torch.zeros(B))
    told = Parameterization(0.5, "log_sigma").of(network)
    loss = twin(False).loss(draws, Networks(told, single_pass))
    assert not loss.dropped.any() and loss.per_sample.isfinite().all()


@pytest.mark.parametrize("r", [1.0, 0.3])
@pytest.mark.parametrize("distill", [True, False])
def test_twins_converge_to_the_continuous_tangent_at_first_order(distill, r):
    network, teacher, draws = small_network(), small_network(), some_draws(0.5, r)
    networks = Networks(network, single_pass, teacher)
    limit = consistency(0.5, distill).evaluate(draws, networks)
    errors = []
    for gap in (4e-3, 2e-3, 1e-3):
        ours = twin(distill).evaluate(replace(draws, s=draws.t - gap), networks)
        errors.append(torch.stack([l2_norm(ours.g - limit.g), l2_norm(ours.t_F - limit.t_F)]))
    first, second = errors[0] / errors[1], errors[1] / errors[2]
    assert errors[2].max() < 5e-3 * l2_norm(limit.g).max()
    assert (first.log2() - 1).abs().max() < 0.1 and (second.log2() - 1).abs().max() < 0.05


@pytest.mark.parametrize("broken", ["sign", "sigma_data"])
def test_a_broken_difference_does_not_converge(broken):
    """The mutation: F(x_s, s) enters with another sign, or sigma_d is left out."""
    network, draws = small_network(), some_draws(0.5)
    limit = consistency(0.5, False).evaluate(draws, Networks(network, single_pass))
    x_t, v, s = diffuse(draws.x0, draws.z, draws.t), velocity(draws.x0, draws.z, draws.t), draws.t - 1e-4
    F = network(x_t / 0.5, draws.t, draws.labels)[0].detach()
    F_s = network(jump(x_t, v / 0.5, draws.t, s, 0.5) / 0.5, s, draws.labels)[0].detach()

    def error(F_s: Tensor, sigma_data: float) -> float:
        delta = difference(x_t, v, F, F_s, draws.t, s, 1.0, sigma_data)
        return (l2_norm(per_sample(draws.t.cos(), delta) * delta - limit.g) / l2_norm(limit.g)).max()

    assert error(F_s, 0.5) < 1e-2
    assert error(2 * F - F_s if broken == "sign" else F_s, 0.5 if broken == "sign" else 1.0) > 0.1


def test_student_and_its_earlier_self_share_the_dropout_mask():
    """With dropout, a difference over a tiny gap is finite only if both draw one mask."""
    options = DiTOptions(width=32, depth=2, heads=2, patch_size=2, dropout=0.3)
    network = build_network(options, *SHAPE, Conditioning(10)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    draws = some_draws(0.5)
    networks = Networks(network, single_pass)
    torch.manual_seed(3)
    limit = consistency(0.5, False).evaluate(draws, networks)
    torch.manual_seed(3)
    ours = twin(False).evaluate(replace(draws, s=draws.t - 1e-5), networks)
    torch.testing.assert_close(ours.F, limit.F, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.g, limit.g, rtol=0, atol=1e-4 * limit.g.abs().max().item())


# --- What is drawn --------------------------------------------------------------------------------------------------


def test_twins_draw_neighbours_and_the_lowest_ends_on_the_data():
    draws, levels = drawn(replace(twin(False), time_mean=-3.0)), FromData(0.02, 80.0, 7.0).levels(17)
    assert levels[0] == 0 and levels[1].item() == pytest.approx(0.02) and levels[-1].item() == pytest.approx(80.0)
    times = time_of(levels, 0.5).float()
    index = (draws.t[:, None] - times).abs().argmin(1)
    assert torch.equal(draws.t, times[index]) and torch.equal(draws.s, times[index - 1]) and index.min() == 1
    expected = lognormal_cells(levels, -3.0, 1.4)
    counted = torch.bincount(index - 1, minlength=16) / 4000
    assert (counted - expected).abs().max() < 4 * 0.5 / 4000**0.5 and expected[0] > 0.1


def test_segments_are_even_and_told():
    plain, draws = drawn(consistency(0.5, True)), drawn(consistency(0.5, True, segments=SEGMENTS))
    assert plain.s is None and torch.equal(plain.t, draws.t)
    assert ((draws.s <= draws.t) & (draws.t - draws.s < 1.000001 * T_MAX / SEGMENTS)).all()
    torch.testing.assert_close(draws.s.unique(), T_MAX / SEGMENTS * torch.arange(4.0))


@pytest.mark.parametrize("guided", [True, False])
def test_the_lowest_segment_is_plain_scd(guided):
    """Where t_k = 0 nothing differs but what the network is told; and one segment is scd."""
    student, teacher, told = small_network(), small_network(), []

    def jumping(u, t, labels, guidance, end):
        told.append((guidance, end))
        return student(u, t, labels)

    objective = consistency(0.5, True, segments=SEGMENTS)
    draws = replace(some_draws(0.5), t=torch.linspace(0.05, 0.35, B, dtype=torch.float64))
    if guided:
        draws = replace(draws, guidance=torch.linspace(1, 2, B, dtype=torch.float64))
    segmented = replace(draws, s=lower_ends(draws.t))
    plain_student = (lambda u, t, labels, guidance: student(u, t, labels)) if guided else student
    plain = consistency(0.5, True).loss(draws, Networks(plain_student, single_pass, teacher))
    ours = objective.loss(segmented, Networks(jumping, single_pass, teacher))
    assert torch.equal(ours.per_sample, plain.per_sample)
    assert len(told) == 1 and told[0][0] is draws.guidance and told[0][1] is segmented.s
    one: ContinuousConsistency = replace(objective, segments=1)
    assert one == consistency(0.5, True) and one.draw.__func__ is type(objective).draw
    higher = replace(draws, t=draws.t + 0.5)
    assert not torch.allclose(
        objective.loss(replace(higher, s=lower_ends(higher.t)), Networks(jumping, single_pass, teacher)).per_sample,
        consistency(0.5, True).loss(higher, Networks(plain_student, single_pass, teacher)).per_sample,
    )


def test_the_tangent_of_a_segment_is_that_of_its_jump():
    """cos delta d/dt [cos delta x - sin delta sigma_d F], by forward mode through the jump itself."""
    told = Conditioning(10, jumps=True)
    network = build_network(DiTOptions(width=32, depth=2, heads=2, patch_size=2), *SHAPE, told).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    draws = some_draws(0.5)
    draws, teacher = replace(draws, s=lower_ends(draws.t)), small_network()
    g = consistency(0.5, True, segments=SEGMENTS).evaluate(draws, Networks(network, single_pass, teacher)).g
    x_t = diffuse(draws.x0, draws.z, draws.t)
    dx_dt = 0.5 * teacher(x_t / 0.5, draws.t, draws.labels)[0].detach()

    def f(x, t):
        return (jump(x, network(x / 0.5, t, draws.labels, None, draws.s)[0], t, draws.s, 0.5),)

    _, df_dt = recorded(f, (x_t, draws.t), (dx_dt, torch.ones_like(draws.t)))
    torch.testing.assert_close(g, per_sample((draws.t - draws.s).cos(), g) * df_dt.detach(), rtol=1e-9, atol=1e-11)
    wrong = consistency_tangent(x_t, dx_dt, network(x_t / 0.5, draws.t, draws.labels, None, draws.s)[0], 0 * g,
                                draws.t, 1.0, 0.5)  # fmt: skip
    assert (wrong - g).abs().max() > 1e-2
