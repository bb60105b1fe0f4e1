"""CTM in float64 against closed forms and identities."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import single_pass
from models.tangent.randomness import RandomState
from sctrain.config.objectives import TrajectoryObjective
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Networks, Progress
from sctrain.objectives.discrete import DiscreteConsistency, even
from sctrain.objectives.drawing import Data, l2_norm
from sctrain.objectives.levels import Grid, UniformPairs
from sctrain.objectives.metrics import l2
from sctrain.objectives.trajectory import ConsistencyTrajectory, TrajectoryDraws, differentiated, gradient_ratio
from sctrain.parameterization import Parameterization
from sctrain.processes import denoise, diffuse, jump, per_sample
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.solvers import ode_step

B, SHAPE, LEVELS = 24, (1, 8, 8), 6
GAUSSIAN = Gaussian.example(0.5)
HALF_WAY = next(
    images for images in range(99) if int(SampleGenerator(3, [], Purpose.TRAINING).of_batch(images) * 6) == 2
)


def objective(kind=ConsistencyTrajectory, **changes) -> ConsistencyTrajectory:
    made = build_objective(TrajectoryObjective(name="ctm", levels=LEVELS), Data(0.5, 10), SHAPE)
    assert isinstance(made, ConsistencyTrajectory)
    settings = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return kind(**settings | changes)


def drawn(made: ConsistencyTrajectory, x0=None, positions=range(B), images=0) -> TrajectoryDraws:
    """In float64."""
    x0 = 0.5 * torch.randn(B, *SHAPE, dtype=torch.float64) if x0 is None else x0
    generator = SampleGenerator(3, positions, Purpose.TRAINING)
    draws = made.draw(generator, Batch(x0, torch.arange(len(x0)) % 10), Progress(images, 1000))
    return replace(draws, z=draws.z.double(), denoising_z=draws.denoising_z.double())


def of_gaussian(made: ConsistencyTrajectory, images=0) -> TrajectoryDraws:
    return drawn(made, GAUSSIAN.sample(B, torch.Generator().manual_seed(1)), images=images)


def small_network(seed: int, dropout: float = 0.0):
    """A float64 DiT that is told where its jump ends, and listens: no gate is zero."""
    torch.manual_seed(seed)
    options = DiTOptions(width=32, depth=2, heads=2, patch_size=2, dropout=dropout)
    network = build_network(options, *SHAPE, Conditioning(10, jumps=True)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def teacher(u, t, labels):
    return torch.tanh(u) * per_sample(t.cos(), u), torch.zeros_like(t)


class ExactTeacher(ConsistencyTrajectory):
    """Follows the flow of the Gaussian."""

    def solve(self, x, draws, networks):
        return GAUSSIAN.flow(x, draws.t, draws.path[-1])


def test_the_jump_is_the_papers_in_edm_variables():
    """G = (s/t) x + (1 - s/t) g; to 0 it is a consistency function, and where s = t its slope is the denoiser's."""
    t = 0.1 + 1.4 * torch.rand(B, dtype=torch.float64)
    s = t * torch.rand(B, dtype=torch.float64)
    x, F = torch.randn(2, B, *SHAPE, dtype=torch.float64)
    g, ratio = denoise(x, F, t, 0.5), per_sample(s.tan() / t.tan(), x)
    G = ratio * x / per_sample(t.cos(), x) + (1 - ratio) * g
    torch.testing.assert_close(jump(x, F, t, s, 0.5) / per_sample(s.cos(), x), G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jump(x, F, t, torch.zeros_like(t), 0.5), g, rtol=1e-12, atol=1e-12)
    assert torch.equal(jump(x, F, t, t, 0.5), x)


@pytest.mark.parametrize("matching", ["soft", "global", "local"])
def test_draws(matching):
    made = objective(matching=matching)
    times, steps, ends, starts = made.times(), set(), set(), set()
    assert len(times) == LEVELS + 1 and times[0] == 0
    torch.testing.assert_close(0.5 * times[[1, -1]].tan(), torch.tensor([0.002, 80.0], dtype=torch.float64))
    for images in range(40):
        draws = drawn(made, positions=range(B * images, B * images + B), images=images)
        index = torch.searchsorted(times, draws.path)
        assert torch.equal(times[index], draws.path) and torch.equal(draws.path[0], draws.t)
        assert (index.diff(dim=0) == -1).all(), "one level for every step of the teacher"
        steps.add(len(index) - 1)
        assert (draws.s <= draws.path[-1]).all() and (draws.path[-1] < draws.t).all()
        if matching == "global":
            assert torch.equal(draws.s, draws.path[-1])
        ends |= set(torch.searchsorted(times, draws.s).tolist())
        starts |= set(index[0].tolist())
    assert steps == ({1} if matching == "local" else set(range(1, LEVELS + 1)))
    assert ends == set(range(LEVELS)) and starts == set(range(1, LEVELS + 1))
    assert len(drawn(objective(most_steps=2), images=1).path) <= 3


def test_denoising_times():
    """Half of ln sigma is normal; the other half, sigma^(1/7), is even from the top of the grid to 70% below it."""
    made = objective(levels=18)
    t = made.denoising_times(SampleGenerator(0, range(20_000), Purpose.TRAINING))
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    depth = (high - (0.5 * t.tan()) ** (1 / 7)) / (high - low)
    for at in (0.1, 0.3, 0.5, 0.69, 0.8):
        sigma = (high - at * (high - low)) ** 7
        normal = 0.5 * (1 - math.erf((math.log(sigma) + 1.2) / (1.2 * math.sqrt(2))))
        expected = 0.5 * normal + 0.5 * min(at / 0.7, 1)
        assert abs((depth < at).double().mean() - expected) < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("matching", ["soft", "global", "local"])
def test_the_exact_jump_has_no_matching_loss_and_no_wrong_one(matching):
    made = objective(ExactTeacher, matching=matching, denoising=0.0)
    draws = of_gaussian(made, images=HALF_WAY)

    def swapped(u, t, labels, guidance, end):
        return GAUSSIAN.jumper(u, end.clamp_min(1e-3), labels, guidance, t)

    def without_sigma_data(u, t, labels, guidance, end):
        F, w = GAUSSIAN.jumper(u, t, labels, guidance, end)
        return 0.5 * F, w

    def distances(student, target):
        return made.loss(draws, Networks(student, single_pass, GAUSSIAN.teacher, target)).per_sample

    def exact(*inputs):
        return GAUSSIAN.jumper(*inputs)

    assert distances(exact, exact).max() < 1e-18
    moved = (draws.t > 0.05) & ((draws.path[-1] > draws.s) | (matching == "global"))
    assert moved.sum() > 3
    for broken in (swapped, without_sigma_data):
        assert distances(broken, exact)[moved].min() > 1e-8, broken.__name__


def test_the_teacher_follows_its_trajectory_to_second_order():
    errors = []
    for levels in (16, 32):
        made = objective(levels=levels)
        times = made.times()
        draws = of_gaussian(made)
        path = times.flip(0)[:-1, None].expand(-1, B)  # from the top to sigma_min
        x = diffuse(draws.x0, draws.z, path[0])
        solved = made.solve(x, replace(draws, path=path), Networks(GAUSSIAN.jumper, single_pass, GAUSSIAN.teacher))
        errors.append(l2_norm(solved - GAUSSIAN.flow(x, path[0], path[-1])).mean())
    assert errors[1] < 0.05 and 3 < errors[0] / errors[1] < 6


def test_to_0_in_one_step_it_is_consistency_distillation():
    """With s = 0 and u next to t, the target's jumps to 0 are none, and the loss is CD's."""
    made = objective(matching="local", denoising=0.0, jump_by="target")
    draws = drawn(made)
    zeros = torch.zeros_like(draws.t)
    student, target = small_network(1), small_network(2).requires_grad_(False)
    networks = Networks(student, single_pass, teacher, target)
    ours = made.loss(replace(draws, s=zeros), networks).per_sample

    def of(network):
        return lambda u, t, labels: network(u, t.clamp_min(1e-6), labels, None, torch.zeros_like(t))

    cd = DiscreteConsistency(
        *(0.5, 10, 0.0), pairs=UniformPairs(Grid(), 18), neighbour="heun", metric=l2, weight=even, keep=lambda _: 0.9
    )
    pairs = replace(draws, s=draws.path[-1])
    theirs = cd.loss(pairs, Networks(of(student), single_pass, teacher, of(target))).per_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    parameters = list(student.parameters())
    gradients = [torch.autograd.grad(loss.mean(), parameters, allow_unused=True) for loss in (ours, theirs)]
    assert sum(gradient is not None for gradient in gradients[0]) > 20
    for mine, other in zip(*gradients, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-15)


def test_the_gradient_is_that_of_the_whole_expression_through_the_target():
    """Against autograd on the formula as it is written, with the jump of sg(theta) as the goal."""
    made = objective(denoising=0.0)
    draws = drawn(made, images=HALF_WAY)
    assert len(draws.path) == 4, "three steps of the teacher"
    student, target = small_network(1), small_network(2)
    loss = made.loss(draws, Networks(student, single_pass, teacher, target.requires_grad_(False)))
    t, u, s, labels = draws.t, draws.path[-1], draws.s, draws.labels

    def G(network, x, start, end):
        F, _ = network(x / 0.5, start.clamp_min(math.atan(0.002 / 0.5)), labels, None, end)
        return jump(x, F, start, end, 0.5)

    x_t, zeros = diffuse(draws.x0, draws.z, t), torch.zeros_like(t)
    x = x_t
    for now, then in zip(draws.path[:-1], draws.path[1:], strict=True):
        x = ode_step(teacher, x, now, then, (labels,), 0.5)
    goal = G(target, G(student, x, u, s), s, zeros).detach()
    expected = l2(G(target, G(student, x_t, t, s), s, zeros), goal)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-12, atol=1e-15)
    parameters = list(student.parameters())
    ours, theirs = (torch.autograd.grad(x.mean(), parameters, allow_unused=True) for x in (loss.per_sample, expected))
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-15)
    assert all(parameter.grad is None for parameter in target.parameters())


def test_denoising_is_least_at_the_true_denoiser():
    made, count = objective(), 20_000
    g = torch.Generator().manual_seed(5)
    x0 = GAUSSIAN.sample(count, g)
    z = 0.5 * torch.randn(x0.shape, generator=g, dtype=torch.float64)
    t = torch.full((count,), 0.8, dtype=torch.float64)
    draws = TrajectoryDraws(x0, z, t, torch.zeros(count), s=t, path=t[None], denoising_t=t, denoising_z=z)

    x_t = diffuse(x0, z, t)
    exact = GAUSSIAN.jumper(x_t / 0.5, t, draws.labels, None, t)[0]

    def loss(F):
        return made.denoising_term(F, draws)[0]

    assert loss(exact).mean() < loss(0.95 * exact).mean() and loss(exact).mean() < loss(1.05 * exact).mean()
    F = torch.randn_like(x0)
    weight = 1 / (t.sin() * 0.5) ** 2  # lambda(sigma) = 1 / c_out^2
    torch.testing.assert_close(weight * l2(denoise(x_t, F, t, 0.5), x0), loss(F), rtol=1e-10, atol=0)


def test_balance_makes_both_gradients_equally_long():
    made, student, target = objective(), small_network(1), small_network(2).requires_grad_(False)
    draws, networks = drawn(made, images=HALF_WAY), Networks(student, single_pass, teacher, target)
    x_t = diffuse(draws.x0, draws.z, draws.t)
    x_u = made.solve(x_t, draws, networks)
    F, F_denoising, F_u, finite = made.outputs(x_t, x_u, draws, networks)
    matched, matched_square, sound = made.matching_term(x_t, x_u, F, F_u, draws, networks)
    denoised, denoised_square = made.denoising_term(F_denoising, draws)
    assert finite.all() and sound.all()
    balance = gradient_ratio(matched_square, denoised_square, networks)
    for term, square in ((matched, matched_square), (denoised, denoised_square)):
        (gradient,) = torch.autograd.grad(term.sum(), F if term is matched else F_denoising, retain_graph=True)
        torch.testing.assert_close(l2_norm(gradient) ** 2, square)
    torch.testing.assert_close(balance * denoised_square.mean().sqrt(), matched_square.mean().sqrt(), rtol=2e-3, atol=0)
    whole = made.loss(draws, networks)
    torch.testing.assert_close(whole.per_sample, matched + balance * denoised, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.diagnostics["balance"], balance.expand(B))
    assert torch.equal(whole.times["velocity_error"], draws.denoising_t)


def test_differentiated_losses_keep_value_and_gradient():
    F = torch.randn(3, *SHAPE, dtype=torch.float64, requires_grad=True)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses, squares = differentiated(lambda F: (weight * F.sin()).flatten(1).square().sum(1), F)
    torch.testing.assert_close(losses, F.sin().square().flatten(1).sum(1))
    losses.sum().backward()
    torch.testing.assert_close(F.grad, (2 * F).sin())
    torch.testing.assert_close(squares, (2 * F).sin().square().flatten(1).sum(1))
    assert weight.grad is None


def test_draws_and_losses_do_not_depend_on_the_split():
    """1 x B equals 2 x B/2: gradients too, for the ranks agree on the balance."""
    made, student, target = objective(), small_network(1), small_network(2).requires_grad_(False)
    x0 = 0.5 * torch.randn(B, *SHAPE, dtype=torch.float64)
    whole = drawn(made, x0, images=HALF_WAY)
    halves = [drawn(made, x0[part], range(B)[part], images=HALF_WAY) for part in (slice(0, B // 2), slice(B // 2, B))]
    halves = [
        replace(half, labels=whole.labels[part])
        for half, part in zip(halves, (slice(0, 12), slice(12, 24)), strict=True)
    ]
    for name in ("z", "t", "s", "path", "denoising_t", "denoising_z"):
        joined = torch.cat([getattr(half, name) for half in halves], dim=1 if name == "path" else 0)
        assert torch.equal(getattr(whole, name), joined), name
    told = []

    def networks(mean):
        return Networks(student, single_pass, teacher, target, mean)

    def noted(values):
        told.append(values)
        return values

    alone = [made.loss(half, networks(noted)).per_sample for half in halves]
    agreed = torch.stack(told).mean(0)
    together = [made.loss(half, networks(lambda _: agreed)).per_sample for half in halves]
    loss = made.loss(whole, networks(lambda values: values)).per_sample
    torch.testing.assert_close(loss, torch.cat(together), rtol=1e-10, atol=1e-15)
    assert (loss - torch.cat(alone)).abs().max() > 1e-6, "each with a balance of its own would differ"
    parameters = list(student.parameters())
    ours = torch.autograd.grad(torch.cat(together).mean(), parameters, allow_unused=True)
    for mine, other in zip(ours, torch.autograd.grad(loss.mean(), parameters, allow_unused=True), strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-14)


def test_both_sides_draw_the_same_dropout_masks(monkeypatch):
    """Where the teacher stays, both sides are the same jumps, and differ in nothing but their masks."""

    class Resting(ConsistencyTrajectory):
        def solve(self, x, draws, networks):
            return x

    made = objective(Resting)
    draws = drawn(made, images=HALF_WAY)
    draws = replace(draws, path=draws.t[None])
    student, target = small_network(1, dropout=0.5), small_network(2, dropout=0.5).requires_grad_(False)
    networks = Networks(student, single_pass, teacher, target)
    assert made.loss(draws, networks).diagnostics["distance"].max() < 1e-25
    monkeypatch.setattr(RandomState, "replayed", lambda self: nullcontext())
    assert made.loss(draws, networks).diagnostics["distance"].max() > 1e-6


@pytest.mark.parametrize("matching", ["soft", "global"])
def test_networks_that_are_told_the_logarithm_of_sigma_reach_0(matching):
    """ln 0 is none: jumps from 0 to 0 are still the identity, and the teacher's last step is Euler's."""
    made, as_F = objective(matching=matching), Parameterization(0.5, "log_sigma").of
    draws = drawn(made, images=HALF_WAY)
    assert (draws.s == 0).any() and (matching == "soft" or (draws.path[-1] == 0).any())
    student, target = small_network(1), small_network(2).requires_grad_(False)
    loss = made.loss(draws, Networks(as_F(student), single_pass, as_F(teacher), as_F(target)))
    assert loss.per_sample.isfinite().all() and not loss.dropped.any()
    loss.per_sample.mean().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_a_goal_that_is_not_finite_drops_its_sample_and_no_other():
    made, student, target = objective(), small_network(1), small_network(2).requires_grad_(False)
    draws = drawn(made, images=HALF_WAY)

    def overflowing(u, t, labels):
        F, w = teacher(u, t, labels)
        return F.where(per_sample(torch.arange(B) != 2, F), float("inf")), w

    loss = made.loss(draws, Networks(student, single_pass, overflowing, target))
    assert loss.dropped.tolist() == [index == 2 for index in range(B)]
    assert loss.per_sample[2] == 0 and (loss.per_sample[loss.dropped.logical_not()] > 0).all()
    loss.per_sample.mean().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_more_steps_of_the_teacher_than_levels_are_refused():
    with pytest.raises(ValueError, match="teacher_steps 19 exceeds levels 18"):
        TrajectoryObjective(name="ctm", teacher_steps=19)
    method = TrajectoryObjective(name="ctm", target_decay=0.0)
    assert method.has_target and method.told_the_end and method.anchor == 0, "a jump to where it starts is none"
