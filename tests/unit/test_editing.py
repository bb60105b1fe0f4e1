"""Zero-shot editing: the operators in float64, and algorithm 4 with an exact consistency function."""

import math

import pytest
import torch
from gaussian import Gaussian

from sctrain.editing import given
from sctrain.editing.algorithm import denoised, from_strokes, slerp, zero_shot
from sctrain.editing.measurements import Measurement, colorization, inpainting, superresolution
from sctrain.editing.operators import ColourTransform, Identity, PatchTransform, PerChannel, completed
from sctrain.parameterization import Parameterization
from sctrain.processes import T_MAX
from sctrain.sampling import initial_noise, karras_times

OPERATORS = [
    (Identity(), (2, 1, 3, 5)),
    (ColourTransform(), (2, 3, 4, 6)),
    (PerChannel(ColourTransform(), (0.4, 0.5, 0.7)), (2, 3, 4, 6)),
    (PatchTransform(2), (3, 1, 4, 6)),
    (PatchTransform(3), (2, 3, 9, 6)),
    (PatchTransform(8), (1, 3, 32, 16)),
]
MISSING = torch.tensor([[False, True, True], [False, True, False]])


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def isotropic(shape, sigma_data=0.5):
    """Independent pixels, all of mean 0.4 and standard deviation 0.3."""
    return Gaussian(torch.full(shape, 0.4).double(), torch.full(shape, 0.3).double(), sigma_data)


def edited(gaussian, y, measurement, steps=6, seed=3):
    n, sigma_data = len(y), gaussian.sigma_data
    times = karras_times(steps, sigma_data)[:-1]
    return zero_shot(gaussian.student, y, measurement, torch.zeros(n), sigma_data, times, seed, torch.arange(n))


@pytest.mark.parametrize(("operator", "shape"), OPERATORS)
def test_operators_are_inverted_to_the_last_digits(operator, shape):
    x = normal(*shape)
    torch.testing.assert_close(operator.inverse(operator(x)), x, rtol=0, atol=1e-12)
    coefficients = torch.randn_like(operator(x))
    torch.testing.assert_close(operator(operator.inverse(coefficients)), coefficients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("operator", "shape"), [pair for pair in OPERATORS if not isinstance(pair[0], PerChannel)])
def test_operators_are_orthogonal(operator, shape):
    x, y = normal(*shape), normal(*shape)
    assert (operator(x) * operator(y)).sum().item() == pytest.approx((x * y).sum().item(), abs=1e-11)


@pytest.mark.parametrize("n", [2, 9, 64, 256])
def test_a_completed_matrix_is_orthogonal_and_begins_as_it_should(n):
    first = torch.linspace(1, 2, n, dtype=torch.float64)
    q = completed(first)
    torch.testing.assert_close(q.T @ q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q[:, 0], first / first.norm(), rtol=0, atol=1e-12)


def test_colour_matrix_is_the_printed_one_up_to_the_sign_of_a_column():
    printed = torch.tensor([[0.4471, -0.8204, 0.3563], [0.8780, 0.4785, 0.0], [0.1705, -0.3129, -0.9343]])
    ours = completed(torch.tensor([0.2989, 0.5870, 0.1140], dtype=torch.float64)).float()
    for column in range(3):
        sign = torch.sign((ours[:, column] * printed[:, column]).sum())
        torch.testing.assert_close(sign * ours[:, column], printed[:, column], rtol=0, atol=1.5e-4)
    assert (ours[:, 0] > 0).all()


def test_first_coefficients_are_luminance_and_mean():
    x = normal(2, 3, 4, 4)
    weights = torch.tensor([0.2989, 0.5870, 0.1140], dtype=torch.float64)
    luminance = torch.einsum("bchw,c->bhw", x, weights) / weights.norm()
    torch.testing.assert_close(ColourTransform()(x)[:, 0], luminance)
    torch.testing.assert_close(PatchTransform(2)(x)[:, :, 0], 2 * torch.nn.functional.avg_pool2d(x, 2))


def test_patches_are_numbered_row_by_row():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 2, 1] = 1.0  # row 0, column 1 of the patch in row 1, column 0
    q = completed(torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(PatchTransform(2)(x)[0, 0, :, 1, 0], q[1])


@pytest.mark.parametrize("measurement", [colorization(), colorization((0.4, 0.5, 0.7)), superresolution(4)])
def test_replacement_keeps_what_is_known_and_what_is_generated(measurement):
    x, y = normal(2, 3, 8, 8), normal(2, 3, 8, 8)
    A, unknown = measurement.operator, measurement.unknown
    mixed = A(measurement.replaced(x, y))
    torch.testing.assert_close(mixed, torch.where(unknown, A(x), A(y)), rtol=0, atol=1e-12)
    torch.testing.assert_close(A(measurement.projected(y)), A(y) * ~unknown, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("operator", "shape"), OPERATORS)
def test_with_nothing_unknown_the_replacement_is_the_given_image(operator, shape):
    x, y = normal(*shape), normal(*shape)
    nothing = Measurement(operator, torch.tensor(False))
    torch.testing.assert_close(nothing.replaced(x, y), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(Measurement(operator, torch.tensor(True)).replaced(x, y), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("measurement", "tolerance"),
    [(inpainting(torch.rand(16, 16) > 0.5), 0.0), (colorization((0.4, 0.5, 0.7)), 1e-6), (superresolution(8), 1e-6)],
)
def test_known_coefficients_leave_unchanged_in_float32(measurement, tolerance):
    y = 0.5 * normal(4, 3, 16, 16, dtype=torch.float32)

    def network(u, t, labels):
        return torch.sin(3 * u) + t.reshape(-1, 1, 1, 1), torch.zeros_like(t)

    x = zero_shot(network, y, measurement, torch.zeros(4), 0.5, karras_times(40, 0.5)[:-1], 0, torch.arange(4))
    A, unknown = measurement.operator, measurement.unknown
    unit = A(torch.ones_like(y))  # compared as pixels are: a coefficient of a patch is side times its mean
    off = ((A(x) - A(y)) / unit).masked_fill(unknown, 0).abs().max().item()
    assert off <= tolerance
    assert off == pytest.approx(measurement.deviation(x, y))
    assert ((A(x) - A(y)) * unknown).abs().max() > 0.1, "the rest is generated"


def test_inpainted_pixels_have_the_right_marginal_and_the_others_are_given():
    gaussian, n = Gaussian.example(0.5), 20_000
    y = gaussian.sample(n, torch.Generator().manual_seed(1))
    y_with_nonsense = y.masked_fill(MISSING, math.nan)
    x = edited(gaussian, y_with_nonsense, inpainting(MISSING))
    known = ~MISSING.expand_as(x)
    assert torch.equal(x[known], y[known])
    generated, mean, std = x[..., MISSING], gaussian.mean[..., MISSING], gaussian.std[..., MISSING]
    errors = (generated.mean(0) - mean) / (std / math.sqrt(n))
    assert errors.abs().max() < 4.5
    torch.testing.assert_close(generated.std(0), std, rtol=0.03, atol=0)
    paired = ((generated - mean) * (y[..., MISSING] - mean)).mean(0) / std**2
    assert paired.abs().max() < 4.5 / math.sqrt(n), "what was erased does not come back"


def test_details_over_given_means_have_the_right_marginal():
    gaussian, n = isotropic((1, 4, 4)), 8_000
    y = gaussian.sample(n, torch.Generator().manual_seed(1))
    measurement = superresolution(2)
    coefficients = measurement.operator(edited(gaussian, y, measurement))
    torch.testing.assert_close(coefficients[:, :, 0], measurement.operator(y)[:, :, 0], rtol=0, atol=1e-12)
    details = coefficients[:, :, 1:]
    assert details.mean((0, 1)).abs().max() < 4.5 * 0.3 / math.sqrt(n)
    torch.testing.assert_close(details.std(0), torch.full_like(details[0], 0.3), rtol=0.05, atol=0)


def test_strokes_are_not_erased():
    """With everything unknown, algorithm 4's first line would forget them: CM 2023 starts from them instead."""
    gaussian, n = Gaussian.example(0.5), 5
    strokes, times = normal(n, 1, 2, 3), [math.atan(2.0)]
    x = from_strokes(gaussian.student, strokes, torch.zeros(n), 0.5, times, 3, torch.arange(n))
    z = initial_noise(3, torch.arange(n), (1, 2, 3), 0.5).double()
    noisy = math.cos(times[0]) * strokes + math.sin(times[0]) * z
    expected = gaussian.flow_to_data(noisy, torch.full((n,), times[0], dtype=torch.float64))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    anything = inpainting(torch.ones(2, 3))
    assert torch.equal(edited(gaussian, strokes, anything), edited(gaussian, strokes + 1, anything))


def test_where_the_function_is_the_identity_no_noise_is_left():
    """CM 2023's functions give an image at sigma_min: noise is added to what it has, at the last level none."""
    gaussian, e, n = Gaussian.example(0.5), 0.01, 4
    network = Parameterization(0.5, sigma_min=e).of(gaussian.teacher)
    y, labels, indices = normal(n, 1, 2, 3), torch.zeros(n), torch.arange(n)
    times = karras_times(3, 0.5, e)[:-1]
    results = [zero_shot(network, y, inpainting(MISSING), labels, 0.5, times[:k], 3, indices, e) for k in (2, 3)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-7)
    more = zero_shot(network, y, inpainting(MISSING), labels, 0.5, times, 3, indices)
    assert (more - results[0]).abs().max() > e / 2, "which plain cos t x + sin t z would leave"


def test_denoising_is_the_consistency_function_at_the_noise_level():
    gaussian, sigma = Gaussian.example(0.5), 0.7
    t = torch.full((4,), math.atan(sigma / 0.5), dtype=torch.float64)
    x0, z = gaussian.sample(4, torch.Generator().manual_seed(1)), normal(4, 1, 2, 3)
    noisy = x0 + sigma * z
    x = denoised(gaussian.student, noisy, torch.zeros(4), 0.5, t[0].item())
    torch.testing.assert_close(x, gaussian.flow_to_data(noisy * t[0].cos(), t))


def test_slerp_keeps_ends_length_and_angle():
    first, second = initial_noise(0, torch.arange(2), (3, 8, 8), 0.5).double()
    z = slerp(first, second * (first.norm() / second.norm()), torch.linspace(0, 1, 9))
    torch.testing.assert_close(z[0], first)
    torch.testing.assert_close(z[-1], second * (first.norm() / second.norm()))
    torch.testing.assert_close(z.flatten(1).norm(dim=1), first.norm().expand(9))
    steps = [(a * b).sum() for a, b in zip(z[:-1], z[1:], strict=True)]
    torch.testing.assert_close(torch.stack(steps), steps[0].expand(8))


def test_noise_belongs_to_the_picture_not_to_the_batch():
    gaussian, y, measurement = Gaussian.example(0.5), normal(5, 1, 2, 3), inpainting(MISSING)
    whole = edited(gaussian, y, measurement)
    times = karras_times(6, 0.5)[:-1]
    part = zero_shot(gaussian.student, y[3:], measurement, torch.zeros(2), 0.5, times, 3, torch.tensor([3, 4]))
    torch.testing.assert_close(part, whole[3:], rtol=0, atol=1e-12)
    assert times[0] == pytest.approx(T_MAX) and not torch.equal(whole, edited(gaussian, y, measurement, seed=4))


@pytest.mark.parametrize("measurement", [superresolution(4), colorization()])
def test_clipping_keeps_what_is_known(measurement):
    black, white = torch.zeros(1, 3, 1, 1).double(), torch.full((1, 3, 1, 1), 255.0).double()
    y = 255 * torch.rand(6, 3, 8, 8, dtype=torch.float64) ** 3  # many near black
    x = measurement.replaced(127 + 200 * normal(6, 3, 8, 8), y)
    assert measurement.deviation(x.clamp(black, white), y) > 10
    clipped = measurement.within(x, y, black, white)
    assert clipped.min() >= 0 and clipped.max() <= 255 and measurement.deviation(clipped, y) < 0.5


def test_what_is_given_is_what_is_known():
    pixels = (255 * torch.rand(2, 3, 8, 8)).round()
    assert colorization().deviation(given.gray(pixels), pixels) < 1e-4
    assert superresolution(4).deviation(given.coarse(pixels, 4), pixels) < 1e-4
    gray = pixels[:, :1]
    torch.testing.assert_close(given.gray(gray.expand(-1, 3, -1, -1)), given.gray(gray))
    assert torch.equal(given.coarse(given.enlarged(pixels, 2), 2), given.enlarged(pixels, 2))
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[0, 1] = True
    shown = given.without(pixels, hidden)
    assert (shown[..., 0, 1] == given.UNSEEN).all() and torch.equal(shown[..., ~hidden], pixels[..., ~hidden])
