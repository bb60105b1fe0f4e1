"""The EDM2 U-Net: the published sizes, exact tangents and gradients through every layer, magnitudes that are kept."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.edm2_options import EDM2Options, EDM2Size
from models.execution import Execution
from models.layers import Conditioning, held_parameters
from models.magnitude import (
    MPConv,
    MPLinear,
    mp_cat,
    mp_silu,
    normalized,
    normalized_weights,
    sum_factors,
    unit_size,
)
from models.registry import build_network
from models.tangent.dual import Dual
from models.tangent.engines import TANGENT_ENGINES, finite_difference
from models.tangent.recorded import _recording, recorded

# EDM2 table 6: millions of parameters, thousand million multiply-adds.
PUBLISHED = {
    "xs": (124.7, 45.5),
    "s": (280.2, 102.2),
    "m": (497.8, 180.8),
    "l": (777.5, 282.2),
    "xl": (1119.3, 405.9),
    "xxl": (1523.2, 552.1),
}
OF_SCM = {"s": 280.2, "m": 497.9, "l": 777.6, "xl": 1119.4, "xxl": 1523.4}  # as printed, but for M's 497.8
B, SHAPE = 2, (3, 8, 8)
EXACT = ("single_pass", "two_pass")
SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_channels": 8}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = build_network(EDM2Size(f"edm2-{size}"), 4, 64, 64, Conditioning(1000))  # pyright: ignore[reportArgumentType]
        network(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    parameters, flops = PUBLISHED[size]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == parameters
    assert abs(counter.get_total_flops() / 2e9 / flops - 1) < 0.02  # the counter counts additions too


@pytest.mark.parametrize("size", OF_SCM)
def test_sizes_of_the_scm_form_that_is_told_a_scale_of_guidance(size: str):
    with torch.device("meta"):
        told = Conditioning(1000, guided=True)
        network = build_network(EDM2Size(f"edm2-scm-{size}"), 4, 64, 64, told)  # pyright: ignore[reportArgumentType]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == OF_SCM[size]


def network_and_inputs(name="edm2-scm", dropout=0.0, checkpointing=False, dtype=torch.float64, **options):
    """Told everything; no gain is zero, for a zero tangent would verify nothing."""
    torch.manual_seed(0)
    free = EDM2Options(name, dropout=dropout, **{**SMALL, **options})
    told = Conditioning(10, guided=True, jumps=True, augmented=True)
    network = build_network(free, *SHAPE, told, execution=Execution(checkpointing=checkpointing))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    primals, directions = ([x.to(dtype) for x in (torch.randn(B, *SHAPE), torch.rand(B))] for _ in range(2))
    conditions = (torch.tensor([3, 10]), *(torch.rand(B, *shape).to(dtype) for shape in ((), (), (9,))))
    return network.to(dtype), (primals, directions, *conditions)


def gradients(network, outputs):
    value, w = outputs
    network.zero_grad()
    (value.square().sum() + w.sum()).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def relative(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["edm2", "edm2-scm"])
def test_tangents_and_gradients_equal_those_of_plain_arithmetic(name: str, checkpointing: bool):
    """`recorded` evaluates the formulas as they stand, by PyTorch's own forward mode and autograd."""
    plain, arguments = network_and_inputs(name)
    expected, exact = recorded(plain, *arguments)
    theirs = gradients(plain, expected)
    assert exact.norm() > 0.1
    assert relative(finite_difference(plain, *arguments, step=1e-4)[1], exact.detach()) < 1e-6
    for engine in EXACT:
        network, _ = network_and_inputs(name, checkpointing=checkpointing)
        outputs, tangent = TANGENT_ENGINES[engine](network, *arguments)
        assert not tangent.requires_grad and relative(tangent, exact.detach()) < 1e-12
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        for parameter, gradient in gradients(network, outputs).items():
            torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-9, atol=1e-11, msg=parameter)


def test_a_plain_pass_has_the_same_value_and_gradients():
    network, (primals, _, *conditions) = network_and_inputs()
    with _recording():
        expected = network(*primals, *conditions)
        theirs = gradients(network, expected)
    ours = network(*primals, *conditions)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(network, ours), theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", EXACT)
def test_dropout_masks_are_the_same_in_value_and_tangent(engine: str):
    network, arguments = network_and_inputs(dropout=0.3)
    torch.manual_seed(1)
    exact = finite_difference(network, *arguments, step=1e-4)[1]
    torch.manual_seed(1)
    assert relative(TANGENT_ENGINES[engine](network, *arguments)[1], exact.detach()) < 1e-6


def test_tangents_in_float32_and_bfloat16():
    network, arguments = network_and_inputs()
    exact = recorded(network, *arguments)[1].detach()
    single, (*in_single,) = network_and_inputs(dtype=torch.float32)
    assert relative(TANGENT_ENGINES["single_pass"](single, *in_single)[1].double(), exact) < 1e-5
    (value, w), tangent = TANGENT_ENGINES["single_pass"](single.bfloat16(), *in_single)
    assert value.dtype == tangent.dtype == w.dtype == torch.float32  # of the inputs
    assert relative(tangent.double(), exact) < 0.1


def test_dropout_below_a_resolution():
    network = build_network(EDM2Options(dropout=0.5, dropout_below=4, **SMALL), *SHAPE, Conditioning(10))
    rates = [part.p for name, part in network.named_modules() if name.endswith("dropout")]
    assert rates == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]


def test_clamped_values_stand_still():
    x = Dual(torch.tensor([-300.0, 1.0, 300.0]), torch.ones(3))
    out = x.clamp(-256.0, 256.0)
    assert out.value.tolist() == [-256, 1, 256] and out.tangent.tolist() == [0, 1, 0]


def test_layers_keep_magnitudes():
    x, y = torch.randn(64, 48, 8, 8), torch.randn(64, 16, 8, 8)
    sizes = {
        "convolution": MPConv(48, 64, 3)(x)[..., 1:-1, 1:-1],  # pixels at the edge see zeros
        "linear": MPLinear(48, 512)(x[:, :, 0, 0]),
        "silu": mp_silu(x),
        "cat": mp_cat(x, y),
        "first of cat": mp_cat(x, y)[:, :48] * (48 / 64) ** 0.5 * 2**0.5,
        "sum": sum(f * z for f, z in zip(sum_factors(0.3), (x[:, :16], y), strict=True)),
        "normalised": unit_size(7 * x, 1),
    }
    for name, out in sizes.items():
        assert abs(out.square().mean().sqrt() - 1) < 0.03, name


def test_the_size_of_a_weight_does_not_matter_and_its_gradient_is_across():
    layer, x = MPConv(4, 6, 3), torch.randn(2, 4, 5, 5)
    before = layer(x)
    before.square().sum().backward()
    assert (layer.weight.grad * layer.weight).sum(dim=(1, 2, 3)).abs().max() < 1e-2 * layer.weight.grad.norm()
    with torch.no_grad():
        layer.weight.mul_(50)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)
    assert normalized(layer.weight).square().sum(dim=(1, 2, 3)).sub(1).abs().max() < 1e-3


def test_backward_keeps_the_parameter_and_not_its_quotient():
    """Under ZeRO-3 a kept quotient would stay whole on every rank."""
    layer, kept = MPConv(16, 16, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(1, 16, 4, 4))
    whole = [x for x in kept if x.shape == layer.weight.shape]
    assert [x.data_ptr() for x in whole] == [layer.weight.data_ptr()]


def test_no_gradient_moves_frequencies_and_phases():
    network, (primals, _, *conditions) = network_and_inputs("edm2")
    found = gradients(network, network(*primals, *conditions))
    assert len(held_parameters(network)) == 4
    assert {name for name, gradient in found.items() if not gradient.any()} == held_parameters(network)


def test_normalized_weights_are_named():
    network = build_network(EDM2Options(**SMALL), *SHAPE, Conditioning(10))
    names = normalized_weights(network)
    assert names == [n for n, p in network.named_parameters() if p.ndim > 1] and "head.weight" in names


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"multipliers": (1, 2, 2, 2, 2)}, "network.multipliers halves images of 8x8 4 times"),
        ({"head_channels": 12}, "network.head_channels 12 does not divide the 16 channels at resolution 4"),
        ({"dropout": 1.0}, "network.dropout"),
        ({"channels": 7}, "network.channels must be even"),
        ({"blocks": 0}, "network.blocks must be at least 1"),
        ({"multipliers": ()}, "network.multipliers must be"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        build_network(EDM2Options(**{**SMALL, **options}), *SHAPE, Conditioning(10))
