"""The discrete consistency losses in float64 at the exact consistency function, and their identities."""

import math
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from torch import Tensor, nn

from models.tangent.engines import single_pass
from sctrain.config import objectives as config
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Draws, Networks, Progress
from sctrain.objectives.continuous import consistency_tangent
from sctrain.objectives.discrete import DiscreteConsistency, even
from sctrain.objectives.drawing import Data
from sctrain.objectives.levels import ect_mapping
from sctrain.objectives.metrics import Images, build_metric
from sctrain.processes import ModelSpace, denoise, diffuse, jump, per_sample, time_of, velocity
from sctrain.randomness import Purpose, SampleGenerator

SIGMA_DATA = 0.7
GAUSSIAN = Gaussian.example(SIGMA_DATA)
SHAPE = tuple(GAUSSIAN.mean.shape)
L2 = config.Distance(name="l2")
METHODS = {
    "cd": config.ConsistencyDistillation(name="cd"),
    "ct": config.ConsistencyTraining(name="ct"),
    "ict": config.ImprovedTraining(name="ict"),
    "ect": config.EasyTuning(name="ect"),
    "lcm": config.LatentConsistency(name="lcm"),
    "lcf": config.LatentConsistency(name="lcf"),
}


def build(name: str, **changes) -> DiscreteConsistency:
    objective = build_objective(METHODS[name].model_copy(update=changes), Data(SIGMA_DATA, 10), SHAPE)
    assert isinstance(objective, DiscreteConsistency)
    return objective


def drawn(objective: DiscreteConsistency, count: int = 64, done: float = 1.0, **changes) -> Draws:
    """Draws of the objective itself on the Gaussian's data, in float64."""
    x0 = GAUSSIAN.sample(count, torch.Generator().manual_seed(3))
    generator = SampleGenerator(1, torch.arange(count), Purpose.TRAINING)
    draws = objective.draw(generator, Batch(x0, torch.arange(count) % 10), Progress(int(done * 1000), 1000))
    return replace(draws, z=draws.z.double(), **changes)


class AlongTheFlow(DiscreteConsistency):
    """With an exact solver step in place of the teacher's."""

    def at_neighbour(self, draws: Draws, x_t: Tensor, networks: Networks) -> Tensor:
        assert draws.s is not None
        return GAUSSIAN.flow(x_t, draws.t, draws.s)


@pytest.mark.parametrize("name", METHODS)
def test_on_the_exact_flow_every_residual_of_the_exact_function_is_zero(name):
    objective = build(name, metric=L2)
    draws = drawn(objective)
    exact = Networks(lambda u, t, *_: GAUSSIAN.student(u, t.clamp_min(1e-12), None), single_pass, GAUSSIAN.teacher)
    along = AlongTheFlow(**vars(objective)).loss(draws, exact)
    assert along.diagnostics["distance"].max() < 1e-18
    other = objective.loss(replace(draws, guidance=None), exact)
    assert other.diagnostics["distance"].mean() > 1e-12, "with another neighbour it is not, so this can fail"


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_with_a_solver_the_residual_of_cd_falls_as_its_local_error(solver, order):
    objective = build("cd", solver=solver)
    t, distances = torch.full((64,), 0.9, dtype=torch.float64), []
    for h in (0.02, 0.01):
        draws = drawn(objective, t=t, s=t - h)
        loss = objective.loss(draws, Networks(GAUSSIAN.student, single_pass, GAUSSIAN.teacher))
        distances.append(loss.diagnostics["distance"].mean().sqrt())
    assert math.log2(distances[0] / distances[1]) == pytest.approx(order + 1, abs=0.1)


def posterior_draws(t: float, s: float, count: int) -> tuple[Draws, Tensor]:
    """Many (x0, z) of one x_t, and the indices 0 .. count - 1 of nothing else: cos t x0 + sin t z is the same."""
    g, time = torch.Generator().manual_seed(9), torch.full((count,), t, dtype=torch.float64)
    x_t = diffuse(GAUSSIAN.sample(1, g), SIGMA_DATA * torch.randn(1, *SHAPE, generator=g).double(), time[:1])
    signal, noise = math.cos(t) ** 2 * GAUSSIAN.std**2, math.sin(t) ** 2 * SIGMA_DATA**2
    gain = math.cos(t) * GAUSSIAN.std**2 / (signal + noise)
    mean = GAUSSIAN.mean + gain * (x_t - math.cos(t) * GAUSSIAN.mean)
    spread = GAUSSIAN.std * (noise / (signal + noise)).sqrt()
    x0 = mean + spread * torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)
    z = (x_t - math.cos(t) * x0) / math.sin(t)
    return Draws(x0, z, time, torch.zeros(count).long(), s=torch.full_like(time, s)), x_t


def direction_in_F(objective: DiscreteConsistency, draws: Draws, student) -> Tensor:
    """The gradient of every sample's loss with respect to F at t: (B, C, H, W)."""
    outputs = []

    def network(u, t, *conditions):
        F, w = student(u, t, *conditions)
        outputs.append(F.requires_grad_())
        return outputs[-1], w

    loss = objective.loss(draws, Networks(network, single_pass))
    (gradient,) = torch.autograd.grad(loss.per_sample.sum(), outputs[0])
    return gradient


def deviation(samples: Tensor) -> Tensor:
    """Mean over its standard error, of every pixel."""
    return samples.mean(0) / (samples.std(0) / math.sqrt(len(samples)))


@pytest.mark.parametrize("name", ["ct", "ict", "ect"])
def test_conditional_mean_of_the_direction_is_zero_at_the_exact_function(name):
    """Per sample it is not: dx/dt is the velocity of this sample, whose mean given x_t is that of the flow."""
    objective = build(name, metric=L2, **({"last_levels": 1280} if name == "ct" else {}))
    sigma_t, sigma_s = objective.pairs.draw(SampleGenerator(0, torch.arange(400), Purpose.TRAINING), 1.0)
    near = (sigma_t - 0.6).abs().argmin()
    t, s = (time_of(sigma[near], SIGMA_DATA).item() for sigma in (sigma_t, sigma_s))
    assert 0 < t - s < 0.03 * t
    draws, _ = posterior_draws(t, s, 4000)
    directions = direction_in_F(objective, draws, GAUSSIAN.student)
    assert deviation(directions).abs().max() < 4.5
    assert directions.flatten(1).norm(dim=1).min() > 0.02 * directions.flatten(1).norm(dim=1).mean()
    broader = replace(GAUSSIAN, std=2 * GAUSSIAN.std)
    assert deviation(direction_in_F(objective, draws, broader.student)).abs().max() > 20


def test_at_stage_zero_ect_denoises():
    """r = 0: the target is the clean image whatever the network says of it, the weight 1 / sigma."""
    objective = build("ect", metric=L2)
    draws = drawn(objective, done=0.0)
    clean = draws.s == 0
    assert 0.5 < clean.float().mean() < 1
    loss = objective.loss(draws, Networks(GAUSSIAN.teacher, single_pass))
    x_t = diffuse(draws.x0, draws.z, draws.t)
    denoised = jump(x_t, GAUSSIAN.teacher(x_t / SIGMA_DATA, draws.t, None)[0], draws.t, 0 * draws.t, SIGMA_DATA)
    expected = (denoised - draws.x0).square().mean((1, 2, 3)) / (SIGMA_DATA * draws.t.tan())
    torch.testing.assert_close(loss.per_sample[clean], expected[clean], rtol=1e-10, atol=0)


def test_ect_tends_to_its_continuous_limit():
    """The l2 loss with weight 1 / (t - r): its gradient in F tends to -2 sin t sigma_d (df/dsigma) / D as r -> t."""
    objective = build("ect", metric=L2)
    sigma = torch.linspace(0.2, 3.0, 16, dtype=torch.float64)
    t = time_of(sigma, SIGMA_DATA)
    student = replace(GAUSSIAN, std=1.5 * GAUSSIAN.std).student
    base = drawn(objective, count=16, t=t)
    x_t, dx_dt = diffuse(base.x0, base.z, t), velocity(base.x0, base.z, t)
    cos_sin = t.cos() * t.sin()
    direction = (per_sample(cos_sin, x_t) * dx_dt / SIGMA_DATA, cos_sin)
    F, t_F = torch.func.jvp(lambda u, time: student(u, time, None)[0], (x_t / SIGMA_DATA, t), direction)
    g = consistency_tangent(x_t, dx_dt, F, t_F, t, 1.0, SIGMA_DATA)  # cos t df/dt; dsigma/dt = sigma_d / cos^2 t
    limit = -2 * per_sample(t.sin() * t.cos(), g) * g / math.prod(SHAPE)
    errors = []
    for stage in (7, 8, 9):
        s = time_of(ect_mapping(sigma, stage, 2.0, 8.0, 1.0), SIGMA_DATA)
        errors.append((direction_in_F(objective, replace(base, s=s), student) - limit).norm() / limit.norm())
    assert errors[2] < 0.02 and math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_draws_and_losses_do_not_depend_on_the_split(name):
    """1 x B equals 2 x B/2."""
    objective, B = build(name, label_dropout=0.5), 8
    x0, labels, positions = GAUSSIAN.sample(B, torch.Generator()).float(), torch.arange(B), torch.arange(40, 40 + B)

    def draw(part: slice) -> Draws:
        generator = SampleGenerator(3, positions[part], Purpose.TRAINING)
        return objective.draw(generator, Batch(x0[part], labels[part]), Progress(500, 1000))

    whole, halves = draw(slice(None)), [draw(slice(0, 4)), draw(slice(4, 8))]
    assert (whole.labels == 10).any() and (whole.labels != 10).any() and (whole.s < whole.t).all()
    names = ["x0", "z", "t", "s", "labels"] + ["guidance"] * (whole.guidance is not None)
    for field in names:
        assert torch.equal(getattr(whole, field), torch.cat([getattr(half, field) for half in halves])), field

    def loss(draws: Draws) -> Tensor:
        wide = replace(draws, **{key: getattr(draws, key).double() for key in ("x0", "z", "t", "s")})
        teacher = student = told_of_labels
        return objective.loss(wide, Networks(student, single_pass, teacher)).per_sample

    torch.testing.assert_close(loss(whole), torch.cat([loss(half) for half in halves]), rtol=1e-12, atol=0)


def told_of_labels(u: Tensor, t: Tensor, labels: Tensor, *conditions) -> tuple[Tensor, Tensor]:
    """A function of everything that a network is told; not a sum of terms."""
    shift = per_sample(labels + 1.0 + sum(conditions, torch.zeros(1)), u)
    return (u * (2 + per_sample(t, u)) + shift).sin(), torch.zeros_like(t)


def test_a_guided_step_is_that_of_lcm():
    """z + (1 + w) Psi(z, c) - w Psi(z, none), Psi of DDIM in the form of alpha and sigma, and our scale 1 + w."""
    objective = build("lcm")
    draws = drawn(objective)
    assert draws.guidance is not None and (3 <= draws.guidance).all() and (draws.guidance <= 15).all()
    x_t, none = diffuse(draws.x0, draws.z, draws.t), torch.full_like(draws.labels, 10)
    alpha, sigma, alpha_s, sigma_s = (
        per_sample(f(time), x_t) for time in (draws.t, draws.s) for f in (torch.cos, torch.sin)
    )

    def psi(labels: Tensor) -> Tensor:
        F, _ = told_of_labels(x_t / SIGMA_DATA, draws.t, labels)
        epsilon = sigma * x_t + alpha * SIGMA_DATA * F
        return alpha_s * (x_t - sigma * epsilon) / alpha + sigma_s * epsilon - x_t

    w = per_sample(draws.guidance.double() - 1, x_t)
    expected = x_t + (1 + w) * psi(draws.labels) - w * psi(none)
    ours = objective.at_neighbour(draws, x_t, Networks(told_of_labels, single_pass, told_of_labels))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lcm", "lcf"])
def test_the_lowest_pair_of_lcm_is_tied_to_the_data(name):
    """Its target is x_s itself whatever the network says of it: without that, f could be any constant."""
    objective = build(name, metric=L2)
    draws = drawn(objective, count=256)
    lowest = draws.t == draws.t.min()
    assert lowest.any() and (draws.s[lowest] == 0).all()
    networks = Networks(told_of_labels, single_pass, teacher=told_of_labels)
    x_t, loss = diffuse(draws.x0, draws.z, draws.t), objective.loss(draws, networks)
    x_s = objective.at_neighbour(draws, x_t, networks)
    F, _ = told_of_labels(x_t / SIGMA_DATA, draws.t, draws.labels, draws.guidance)
    expected = (denoise(x_t, F, draws.t, SIGMA_DATA) - x_s).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.per_sample[lowest], expected[lowest])


def test_lcf_has_the_same_noise_at_both_times_and_no_teacher():
    objective = build("lcf")
    draws = drawn(objective)
    ours = objective.at_neighbour(draws, torch.zeros_like(draws.x0), Networks(told_of_labels, single_pass))
    assert torch.equal(ours, diffuse(draws.x0, draws.z, draws.s))


class WithDropout(nn.Module):
    """Half of its units drop out."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        pixels = math.prod(SHAPE)
        layers = nn.Flatten(), nn.Linear(pixels, 32), nn.SiLU(), nn.Dropout(0.5), nn.Linear(32, pixels)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, u: Tensor, t: Tensor, *conditions) -> tuple[Tensor, Tensor]:
        return self.layers(u).reshape(u.shape), torch.zeros_like(t)


def test_student_and_target_draw_one_dropout_mask():
    """At equal times nothing is left, of the student itself or of a target with its weights."""
    objective = replace(build("ict"), weight=even)
    draws = drawn(objective)
    same, network = replace(draws, s=draws.t), WithDropout()
    for target in (None, WithDropout()):
        before = torch.get_rng_state()
        assert objective.loss(same, Networks(network, single_pass, target=target)).diagnostics["distance"].max() < 1e-9
        assert not torch.equal(before, torch.get_rng_state()), "the next step draws other masks"
    u, t = draws.x0 / SIGMA_DATA, draws.t
    assert (network(u, t)[0] - network(u, t)[0]).abs().max() > 0.1


def test_a_target_that_overflowed_drops_its_sample():
    objective = build("ict")
    draws = drawn(objective, count=4)

    def target(u, t, labels):
        F, w = told_of_labels(u, t, labels)
        return F.where(per_sample(torch.arange(4) != 2, F), float("inf")), w

    network = WithDropout().eval()
    loss = objective.loss(draws, Networks(network, single_pass, target=target))
    assert loss.dropped is not None and loss.dropped.tolist() == [False, False, True, False]
    loss.per_sample.sum().backward()
    assert loss.per_sample[2] == 0 and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "constant"),
    [("l2", None), ("l1", None), ("pseudo_huber", None), ("pseudo_huber", 0.0), ("huber", None), ("huber", 0.0)],
)
def test_metrics_of_equal_images_are_zero_with_a_finite_gradient(name, constant):
    """Single pixels are equal often in bf16; without a least constant the root's slope there is nan."""
    images = Images(SHAPE, ModelSpace((0.5,), (0.25,), SIGMA_DATA))
    metric = build_metric(config.Distance(name=name, constant=constant), images)
    x = torch.randn(4, *SHAPE, requires_grad=True)
    y = x.detach().clone()
    y[:2, ..., 0] += 1
    distance = metric(x, y)
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    assert gradient.isfinite().all() and gradient[:2].any() and distance[2:].max() < 1e-9 < 0.1 < distance[:2].min()
