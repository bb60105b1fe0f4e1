"""The one linear change of F between papers: EDM's noise input, and CM 2023's boundary at sigma_min; in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent.engines import finite_difference, single_pass, two_pass
from sctrain.parameterization import Parameterization
from sctrain.processes import denoise, per_sample, sigma_of, time_of

B, SHAPE, EPSILON = 7, (1, 8, 8), 0.002
SIGMAS = torch.tensor([0.002, 0.003, 0.02, 0.3, 0.5, 4.0, 80.0], dtype=torch.float64)


def random_x(sigma: Tensor) -> Tensor:
    """x_sigma = x_t / cos t of EDM."""
    return torch.randn(B, *SHAPE, dtype=torch.float64) * per_sample(1 + sigma, torch.empty(B, *SHAPE))


def edm_network(c_in_x: Tensor, c_noise: Tensor) -> Tensor:
    """Any function of EDM's two inputs."""
    return (3 * c_in_x).sin() + c_in_x * per_sample(c_noise, c_in_x)


def as_module(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same function in TrigFlow's sign: F = -F_EDM (algorithms 3.1); w tells what the network was told."""
    return -edm_network(u, t), t


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.7])
def test_edm_denoiser_is_trigflow_f(sigma_data):
    """D(x_sigma, sigma) = c_skip x + c_out F_EDM(c_in x, ln(sigma) / 4), with EDM's coefficients written out."""
    x, total = random_x(SIGMAS), (SIGMAS**2 + sigma_data**2).sqrt()
    c_skip, c_out, c_in = sigma_data**2 / total**2, SIGMAS * sigma_data / total, 1 / total
    F_edm = edm_network(per_sample(c_in, x) * x, SIGMAS.log() / 4)
    D = per_sample(c_skip, x) * x + per_sample(c_out, x) * F_edm
    t = time_of(SIGMAS, sigma_data)
    x_t = per_sample(t.cos(), x) * x
    network = Parameterization(sigma_data, "log_sigma").of(as_module)
    F, told = network(x_t / sigma_data, t, torch.zeros(B))
    torch.testing.assert_close(denoise(x_t, F, t, sigma_data), D, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(told, SIGMAS.log() / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.7])
def test_anchored_f_has_the_coefficients_of_cm_2023(sigma_data):
    """f = c_skip x + c_out F with (sigma - epsilon) in both (CM 2023 appendix C)."""
    x, total = random_x(SIGMAS), (SIGMAS**2 + sigma_data**2).sqrt()
    above = SIGMAS - EPSILON
    c_skip, c_out = sigma_data**2 / (above**2 + sigma_data**2), sigma_data * above / total
    F_edm = edm_network(x / per_sample(total, x), SIGMAS.log() / 4)
    expected = per_sample(c_skip, x) * x + per_sample(c_out, x) * F_edm
    t = time_of(SIGMAS, sigma_data)
    x_t = per_sample(t.cos(), x) * x
    F, _ = Parameterization(sigma_data, "log_sigma", EPSILON).of(as_module)(x_t / sigma_data, t, torch.zeros(B))
    f = denoise(x_t, F, t, sigma_data)
    torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f[0], x[0], rtol=1e-12, atol=1e-12)  # f(x, epsilon) = x
    plain = denoise(x_t, as_module(x_t / sigma_data, SIGMAS.log() / 4, t)[0], t, sigma_data)
    assert (plain[0] - x[0]).abs().max() > 1e-4, "without the anchor it is the identity at 0 only"


def test_the_anchor_keeps_time_as_input_where_that_is_asked_for():
    t = time_of(SIGMAS, 0.5)
    _, told = Parameterization(0.5, "t", EPSILON).of(as_module)(torch.zeros(B, *SHAPE), t, torch.zeros(B))
    assert torch.equal(told, t)


def test_nothing_is_wrapped_where_nothing_is_changed():
    assert Parameterization(0.5).of(as_module) is as_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_sigma_is_finite_at_a_clean_image(dtype):
    """ECT compares with t = 0: f is the identity there, which 0 times nan would not be."""
    x, t = torch.randn(B, *SHAPE, dtype=dtype), torch.zeros(B, dtype=dtype)
    F, _ = Parameterization(0.5, "log_sigma").of(as_module)(x / 0.5, t, torch.zeros(B))
    assert torch.equal(denoise(x, F, t, 0.5), x)


@pytest.mark.parametrize("sigma_min", [0.0, EPSILON])
@pytest.mark.parametrize("noise_input", ["t", "log_sigma"])
@pytest.mark.parametrize(("engine", "tolerance"), [(single_pass, 1e-10), (two_pass, 1e-10), (finite_difference, 1e-4)])
def test_tangents_pass_the_wrapper(noise_input, sigma_min, engine, tolerance):
    """The engine on Parameterization.of(DiT) against torch's forward mode through the same function."""
    options = DiTOptions(width=32, depth=1, heads=2, patch_size=2)
    module = build_network(options, *SHAPE, Conditioning(10)).double()
    with torch.no_grad():
        for parameter in module.parameters():  # no gate is zero: a zero tangent would verify nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    network, labels = Parameterization(0.5, noise_input, sigma_min).of(module), torch.arange(B)
    t = time_of(SIGMAS, 0.5).clamp(0.05, 1.5)
    primals = (torch.randn(B, *SHAPE, dtype=torch.float64), t)
    direction = (torch.randn(B, *SHAPE, dtype=torch.float64), t.cos() * t.sin())
    (F, _), t_F = engine(network, primals, direction, labels)
    with sdpa_kernel(SDPBackend.MATH):
        expected, t_expected = torch.func.jvp(lambda u, time: network(u, time, labels)[0], primals, direction)
    torch.testing.assert_close(F, expected, rtol=1e-10, atol=1e-12)
    assert (t_F - t_expected).norm() < tolerance * t_expected.norm()
    untold = single_pass(lambda u, time, y: network(u, time.value, y), primals, direction, labels)[1]
    assert (untold - t_expected).norm() > 0.01 * t_expected.norm(), "the part that time has in it is not seen here"


def test_sigma_and_time_are_inverse():
    torch.testing.assert_close(sigma_of(time_of(SIGMAS, 0.7), 0.7), SIGMAS, rtol=1e-12, atol=0)


TIMES = time_of(SIGMAS, 1.0)


def vp_sigma(s: Tensor) -> Tensor:
    """Of the VP process at time s in (0, 1], with its betas written out."""
    return ((0.5 * 19.9 * s**2 + 0.1 * s).exp() - 1).sqrt()


def test_vp_denoiser_is_trigflow_f():
    """D = x - sigma eps(x / sqrt(sigma^2 + 1), 999 s) of score_sde's networks, data in [-1, 1], sigma_d = 1."""
    s = torch.tensor([1e-5, 1e-3, 0.02, 0.1, 0.3, 0.7, 1.0], dtype=torch.float64)
    sigma = vp_sigma(s)
    x = random_x(sigma)
    D = x - per_sample(sigma, x) * edm_network(per_sample((sigma**2 + 1).rsqrt(), x) * x, 999 * s)
    t = time_of(sigma, 1.0)
    x_t = per_sample(t.cos(), x) * x
    network = Parameterization(1.0, "vp", output="noise").of(lambda u, told, _: (edm_network(u, told), told))
    F, told = network(x_t, t, torch.zeros(B))
    torch.testing.assert_close(told, 999 * s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoise(x_t, F, t, 1.0), D, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("output", ["velocity", "noise"])
def test_v_and_noise_prediction_of_ddpm(output):
    """x0 = (x - sqrt(1 - a) eps) / sqrt(a), or sqrt(a) x - sqrt(1 - a) v, at every 111th of the 1000 steps."""
    steps = torch.arange(0, 1000, 111)
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[steps]
    t, x = kept.sqrt().acos(), torch.randn(len(steps), *SHAPE, dtype=torch.float64)
    alpha, sigma = per_sample(kept.sqrt(), x), per_sample((1 - kept).sqrt(), x)
    found = edm_network(x, steps.double())
    x0 = alpha * x - sigma * found if output == "velocity" else (x - sigma * found) / alpha
    network = Parameterization(1.0, "ddpm", output=output).of(lambda u, told, _: (edm_network(u, told), told))
    F, told = network(x, t, torch.zeros(len(steps)))
    torch.testing.assert_close(told, steps.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(denoise(x, F, t, 1.0), x0, rtol=1e-6, atol=1e-6)


def test_steps_between_two_are_monotonous_and_clipped():
    network = Parameterization(1.0, "ddpm").of(lambda u, told: (u, told))
    t = torch.linspace(1e-4, 1.57, 500, dtype=torch.float64)
    told = network(torch.zeros(500, 1, 1, 1).double(), t)[1]
    assert told[0] == 0 and told[-1] == 999 and (told.diff() >= 0).all() and (told.frac() > 0.01).any()
