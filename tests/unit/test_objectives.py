"""The objectives in float64 against closed forms and identities."""

from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import finite_difference, single_pass
from sctrain.objectives.base import Batch, Draws, Networks, Progress
from sctrain.objectives.continuous import ContinuousConsistency, consistency_tangent, normalized
from sctrain.objectives.diffusion import Diffusion
from sctrain.objectives.drawing import l2_norm, mean_square
from sctrain.processes import denoise, diffuse, per_sample, velocity
from sctrain.randomness import Purpose, SampleGenerator

B, SHAPE = 6, (1, 8, 8)


def small_network():
    """A float64 DiT with no zero-initialised gate left: a zero tangent would verify nothing."""
    network = build_network(DiTOptions(width=32, depth=2, heads=2, patch_size=2), *SHAPE, Conditioning(10)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def some_draws(sigma_data: float, r: float = 1.0, shape=SHAPE) -> Draws:
    x0, z = (sigma_data * torch.randn(B, *shape, dtype=torch.float64) for _ in range(2))
    return Draws(x0, z, 0.1 + 1.4 * torch.rand(B, dtype=torch.float64), torch.arange(B), r)


def consistency(sigma_data: float, distill: bool, **changes) -> ContinuousConsistency:
    defaults = ContinuousConsistency(
        sigma_data=sigma_data,
        num_classes=10,
        time_mean=-1.0,
        time_std=1.4,
        label_dropout=0.0,
        distill=distill,
        tangent_normalization="l2",
        tangent_constant=0.1,
        tangent_warmup_images=0,
    )
    return replace(defaults, **changes)


def test_consistency_function_is_the_identity_at_zero():
    x, F = torch.randn(2, B, *SHAPE, dtype=torch.float64)
    assert torch.equal(denoise(x, F, torch.zeros(B, dtype=torch.float64), 0.5), x)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_and_trigflow_are_one_model(sigma_data):
    """algorithms: D = c_skip x + c_out F_edm equals f = cos t x_t - sin t sigma_d F with F = -F_edm."""
    draws = some_draws(sigma_data)
    x_t, sigma = diffuse(draws.x0, draws.z, draws.t), sigma_data * draws.t.tan()
    F_edm = torch.randn_like(x_t)
    x_sigma, total = x_t / per_sample(draws.t.cos(), x_t), (sigma**2 + sigma_data**2).sqrt()
    c_skip, c_out = sigma_data**2 / total**2, sigma * sigma_data / total
    D = per_sample(c_skip, x_t) * x_sigma + per_sample(c_out, x_t) * F_edm
    torch.testing.assert_close(D, denoise(x_t, -F_edm, draws.t, sigma_data), rtol=1e-12, atol=1e-12)
    v = velocity(draws.x0, draws.z, draws.t)
    edm_loss = mean_square(D - draws.x0) / c_out**2
    torch.testing.assert_close(edm_loss, mean_square(-sigma_data * F_edm - v) / sigma_data**2, rtol=1e-11, atol=0)


def rearranged_and_plain(sigma_data: float, tangents_of_paper: bool = False):
    """G from the rearranged tangent, and cos t df/dt from forward-mode AD through f itself."""
    network, draws = small_network(), some_draws(sigma_data)
    x_t, t, dx_dt = diffuse(draws.x0, draws.z, draws.t), draws.t, velocity(draws.x0, draws.z, draws.t)
    cos_sin = t.cos() * t.sin()
    direction = (per_sample(cos_sin, x_t) * dx_dt / sigma_data, cos_sin)
    if tangents_of_paper:  # as printed, for a network that is fed x_t / sigma_d
        direction = (per_sample(cos_sin, x_t) * dx_dt, cos_sin * sigma_data)
    (F, _), t_F = single_pass(network, (x_t / sigma_data, t), direction, draws.labels)
    F = F.detach()
    g = consistency_tangent(x_t, dx_dt, F, t_F, t, 1.0, sigma_data)

    def f(x, time):
        return denoise(x, network(x / sigma_data, time, draws.labels)[0], time, sigma_data)

    with sdpa_kernel(SDPBackend.MATH):  # the only one with a forward mode
        _, df_dt = torch.func.jvp(f, (x_t, t), (dx_dt, torch.ones_like(t)))
    return g, per_sample(t.cos(), x_t) * df_dt.detach(), (F, dx_dt, x_t, t)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_tangent_is_cos_t_df_dt(sigma_data):
    g, expected, (F, dx_dt, x_t, t) = rearranged_and_plain(sigma_data)
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)
    cold = consistency_tangent(x_t, dx_dt, F, torch.full_like(F, 1e9), t, 0.0, sigma_data)
    torch.testing.assert_close(cold, -(per_sample(t.cos(), F) ** 2) * (sigma_data * F - dx_dt))


def test_printed_tangents_of_the_paper_fail_unless_sigma_data_is_one():
    g, expected, _ = rearranged_and_plain(0.5, tangents_of_paper=True)
    assert (g - expected).norm() > 0.01 * expected.norm()
    g, expected, _ = rearranged_and_plain(1.0, tangents_of_paper=True)
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


def test_scd_fed_the_conditional_velocity_is_sct():
    sigma_data, network, draws = 0.5, small_network(), some_draws(0.5)
    v = velocity(draws.x0, draws.z, draws.t) / sigma_data
    networks = Networks(network, single_pass, teacher=lambda u, t, labels: (v, torch.zeros_like(t)))
    losses = [consistency(sigma_data, distill).loss(draws, networks) for distill in (True, False)]
    torch.testing.assert_close(losses[0].per_sample, losses[1].per_sample, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss.per_sample.mean(), list(network.parameters())) for loss in losses]
    for distilled, trained in zip(*gradients, strict=True):
        torch.testing.assert_close(distilled, trained, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("distill", [True, False])
def test_finite_differences_follow_the_same_direction(distill):
    """For sCD that is the teacher's velocity: a difference along the data-noise path would be another tangent."""
    network, draws, teacher = small_network(), some_draws(0.5), small_network()
    norms = []
    for engine in (single_pass, finite_difference):
        loss = consistency(0.5, distill).loss(draws, Networks(network, engine, teacher))
        norms.append((loss.per_sample.detach(), loss.diagnostics["tangent_norm"], loss.diagnostics["tangent_ratio"]))
    for exact, difference in zip(*norms, strict=True):
        torch.testing.assert_close(difference, exact, rtol=2e-5, atol=0)
    other = consistency(0.5, not distill).loss(draws, Networks(network, single_pass, teacher))
    assert (other.diagnostics["tangent_ratio"] / norms[0][2] - 1).abs().max() > 0.01


def test_guided_distillation_follows_the_guided_teacher():
    """dx/dt = sigma_d (F_none + s (F_label - F_none)), every sample with its own s, which the student is told."""
    told = []

    def teacher(u, t, labels):
        return u * per_sample(1.0 + labels, u), torch.zeros_like(t)

    def student(u, t, labels, guidance):
        told.append(guidance)
        return u * per_sample(t, u), torch.zeros_like(t)

    objective = consistency(0.5, True, guidance=(1.0, 3.0))
    draws = replace(some_draws(0.5), guidance=torch.linspace(1, 3, B, dtype=torch.float64))
    u = diffuse(draws.x0, draws.z, draws.t) / 0.5
    expected = 0.5 * u * per_sample(11 + draws.guidance * (draws.labels - 10), u)
    networks = Networks(student, single_pass, teacher)
    torch.testing.assert_close(objective.flow_velocity(draws, u, networks), expected)
    objective.loss(draws, networks)
    assert told == [draws.guidance]


def test_scale_of_guidance_is_drawn_per_sample_and_changes_no_other_draw():
    batch = Batch(torch.randn(64, *SHAPE), torch.arange(64) % 10)
    plain, scaled = (
        consistency(0.5, True, guidance=guidance).draw(
            SampleGenerator(0, range(64), Purpose.TRAINING), batch, Progress(0, 1)
        )
        for guidance in (None, (1.0, 1.5))
    )
    assert plain.guidance is None and len(scaled.guidance.unique()) == 64
    assert 1.0 <= scaled.guidance.min() < 1.1 and 1.4 < scaled.guidance.max() <= 1.5
    for name in ("z", "t", "labels"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_tangent_vanishes_at_the_exact_consistency_function(sigma_data):
    gaussian = Gaussian.example(sigma_data)
    draws = some_draws(sigma_data, shape=gaussian.mean.shape)
    draws = replace(draws, x0=gaussian.sample(B, torch.Generator().manual_seed(1)))
    networks = Networks(gaussian.student, single_pass, gaussian.teacher)
    loss = consistency(sigma_data, distill=True).loss(draws, networks)
    assert loss.diagnostics["tangent_norm"].max() < 1e-10
    for broken in (0.0, 0.9):  # warm-up, or a dropped factor in the tangent, must not vanish
        loss = consistency(sigma_data, distill=True).loss(replace(draws, r=broken), networks)
        assert loss.diagnostics["tangent_norm"].min() > 1e-3


def test_mean_conditional_tangent_vanishes_at_the_exact_consistency_function():
    """sCT: per sample the tangent is not zero, its conditional mean given x_t is. Checked as E[g] against its error."""
    gaussian, count = Gaussian.example(0.5), 40_000
    g = torch.Generator().manual_seed(3)
    x0 = gaussian.sample(count, g)
    z = 0.5 * torch.randn(x0.shape, generator=g, dtype=torch.float64)
    t = torch.full((count,), 0.7, dtype=torch.float64)
    x_t, dx_dt, cos_sin = diffuse(x0, z, t), velocity(x0, z, t), t.cos() * t.sin()
    direction = (per_sample(cos_sin, x0) * dx_dt / 0.5, cos_sin)
    (F, _), t_F = single_pass(gaussian.student, (x_t / 0.5, t), direction, torch.zeros(count))
    tangent = consistency_tangent(x_t, dx_dt, F, t_F, t, 1.0, 0.5)
    error = tangent.std(0) / count**0.5
    assert ((tangent.mean(0) / error).abs() < 4).all()
    assert (tangent.abs().mean(0) > 100 * tangent.mean(0).abs()).all()


def test_normalized_tangent():
    g = 3 * torch.randn(B, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(l2_norm(normalized(g, 0.1, "l2")), l2_norm(g) / (l2_norm(g) + 0.1))
    rms = l2_norm(g) / 8
    torch.testing.assert_close(l2_norm(normalized(g, 0.1, "rms")) / 8, rms / (rms + 0.1))


def test_loss_moves_the_network_along_the_tangent():
    """The gradient with respect to F is -2 e^w / D of the normalised tangent, per sample."""
    network, draws, seen = small_network(), some_draws(0.5), []

    def engine(*arguments):
        (F, w), t_F = single_pass(*arguments)
        F.retain_grad()
        seen.append((F, w, t_F))
        return (F, w), t_F

    loss = consistency(0.5, distill=False).loss(draws, Networks(network, engine))
    loss.per_sample.sum().backward()
    F, w, t_F = seen[0]
    x_t, dx_dt = diffuse(draws.x0, draws.z, draws.t), velocity(draws.x0, draws.z, draws.t)
    g = normalized(consistency_tangent(x_t, dx_dt, F.detach(), t_F, draws.t, 1.0, 0.5), 0.1, "l2")
    torch.testing.assert_close(F.grad, -2 * per_sample(w.exp().detach(), g) * g / 64)


def test_diffusion_loss_is_least_at_the_conditional_velocity():
    gaussian = Gaussian.example(0.5)
    g = torch.Generator().manual_seed(5)
    x0 = gaussian.sample(20_000, g)
    z, t = (
        0.5 * torch.randn(x0.shape, generator=g, dtype=torch.float64),
        torch.full((20_000,), 0.8, dtype=torch.float64),
    )
    objective = Diffusion(0.5, 10, -1.0, 1.4, 0.0)
    draws = Draws(x0, z, t, torch.zeros(20_000))

    def loss(scale):
        network = lambda u, t, labels: (scale * gaussian.teacher(u, t, labels)[0], torch.zeros_like(t))  # noqa: E731
        return objective.loss(draws, Networks(network, single_pass)).per_sample.mean()

    assert loss(1.0) < loss(0.95) and loss(1.0) < loss(1.05)


def test_adaptive_weight_balances_the_loss():
    """d/dw (e^w L - w) = 0 where e^-w = L."""
    draws = some_draws(0.5)
    constant = torch.randn_like(draws.x0)
    objective = Diffusion(0.5, 10, -1.0, 1.4, 0.0)
    error = objective.loss(draws, Networks(lambda u, t, y: (constant, torch.zeros_like(t)), single_pass)).per_sample
    w = (-error.log()).requires_grad_()
    loss = objective.loss(draws, Networks(lambda u, t, y: (constant, w), single_pass)).per_sample
    (gradient,) = torch.autograd.grad(loss.sum(), w)
    assert gradient.abs().max() < 1e-12


def test_draws_and_losses_do_not_depend_on_the_split():
    """1 x B equals 2 x B/2, bit for bit in what is drawn."""
    objective = consistency(0.5, False, label_dropout=0.5, tangent_warmup_images=100)
    x0, labels, positions = torch.randn(B, *SHAPE), torch.arange(B), torch.arange(40, 40 + B)

    def draw(part: slice) -> Draws:
        generator = SampleGenerator(3, positions[part], Purpose.TRAINING)
        return objective.draw(generator, Batch(x0[part], labels[part]), Progress(25, 1000))

    whole, halves = draw(slice(None)), [draw(slice(0, 3)), draw(slice(3, 6))]
    assert whole.r == 0.25 and (whole.labels == 10).any() and (whole.labels != 10).any()
    for name in ("x0", "z", "t", "labels"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    network = small_network().float()
    loss = [objective.loss(draws, Networks(network, single_pass)).per_sample for draws in (whole, *halves)]
    torch.testing.assert_close(loss[0], torch.cat(loss[1:]), rtol=2e-5, atol=1e-6)


def test_a_tangent_that_is_not_finite_drops_its_sample_and_no_other():
    network, draws = small_network(), some_draws(0.5)

    def overflowing(*arguments):
        (F, w), t_F = single_pass(*arguments)
        t_F[2] = float("inf")
        return (F, w), t_F

    objective = consistency(0.5, False)
    whole = objective.loss(draws, Networks(network, overflowing))
    assert whole.dropped.tolist() == [False, False, True, False, False, False]
    assert whole.per_sample[2] == 0 and whole.per_sample.isfinite().all()
    whole.per_sample.sum().backward()
    ours = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    kept = torch.tensor([0, 1, 3, 4, 5])
    others = Draws(*(getattr(draws, name)[kept] for name in ("x0", "z", "t", "labels")))
    objective.loss(others, Networks(network, single_pass)).per_sample.sum().backward()
    for mine, parameter in zip(ours, network.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
