"""Layers and networks: tangents against forward-mode AD of plain formulas, gradients untouched, nothing recorded."""

import pytest
import torch
import torch.nn.functional as F

from models.attention import attention
from models.dit import DiTOptions
from models.layers import Linear, PositionalEmbedding, pixel_norm, scale_shift, silu
from models.registry import build_network
from models.tangent import finite_difference, value_and_tangent

B, N, W, H = 3, 5, 8, 2


def plain_attention(q, k, v):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


LINEAR = Linear(W, 6).double()
CASES = {
    "linear": (LINEAR, lambda x: F.linear(x, LINEAR.weight, LINEAR.bias), [(B, N, W)]),
    "silu": (silu, F.silu, [(B, N, W)]),
    "pixel_norm": (pixel_norm, plain_norm, [(B, N, W)]),
    "scale_shift": (scale_shift, lambda x, a, b: x * a + b, [(B, N, W), (B, 1, W), (B, 1, W)]),
    "attention": (attention, plain_attention, [(B, H, N, W), (B, H, N, W), (B, H, N, W)]),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_carries_the_exact_tangent_and_records_none(name):
    layer, plain, shapes = CASES[name]
    primals = [double(*shape).requires_grad_() for shape in shapes]
    tangents = [double(*shape) for shape in shapes]
    (value,), tangent = value_and_tangent(lambda *x: (layer(*x),), primals, tangents)
    expected, t_expected = torch.func.jvp(plain, tuple(primals), tuple(tangents))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, t_expected.detach(), rtol=1e-10, atol=1e-12)
    assert not tangent.requires_grad and tangent.norm() > 0
    gradients = torch.autograd.grad(value.square().sum(), primals)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), primals), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_attention_with_large_logits():
    q, k, v = (double(1, 1, N, 4) for _ in range(3))
    q = 80 * q
    tangents = [double(1, 1, N, 4) for _ in range(3)]
    _, tangent = value_and_tangent(lambda *x: (attention(*x),), (q, k, v), tangents)
    torch.testing.assert_close(tangent, torch.func.jvp(plain_attention, (q, k, v), tuple(tangents))[1])


def network_and_inputs(dtype=torch.float64, dropout=0.0):
    options = DiTOptions(width=32, depth=2, heads=2, patch_size=2, dropout=dropout)
    network = build_network(options, channels=1, height=8, width=8, num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    u, t, t_u, t_t = torch.randn(B, 1, 8, 8), 1.5 * torch.rand(B), torch.randn(B, 1, 8, 8), torch.rand(B)
    return network.to(dtype), [x.to(dtype) for x in (u, t, t_u, t_t)], torch.tensor([0, 9, 10])


def test_network_tangent_is_exact_and_gradients_are_untouched():
    network, (u, t, t_u, t_t), labels = network_and_inputs()
    (value, w), tangent = value_and_tangent(network, (u, t), (t_u, t_t), labels)
    plain, w_plain = network(u, t, labels)
    assert torch.equal(value, plain) and torch.equal(w, w_plain)
    _, difference = finite_difference(network, (u, t), (t_u, t_t), labels, step=1e-5)
    assert (tangent - difference).norm() < 1e-8 * tangent.norm()
    parameters = list(network.parameters())
    ours = torch.autograd.grad(value.square().sum() + w.sum(), parameters)
    theirs = torch.autograd.grad(plain.square().sum() + w_plain.sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_network_tangent_in_float32():
    network, inputs, labels = network_and_inputs()
    exact = value_and_tangent(network, inputs[:2], inputs[2:], labels)[1]
    u, t, t_u, t_t = (x.float() for x in inputs)
    tangent = value_and_tangent(network.float(), (u, t), (t_u, t_t), labels)[1]
    assert (tangent - exact).norm() < 1e-5 * exact.norm()


def test_dropout_masks_of_value_and_tangent_agree():
    """Both come from one pass: the value equals a plain pass at the same random state, the tangent its derivative."""
    network, (u, t, t_u, t_t), labels = network_and_inputs(dropout=0.3)
    state = torch.random.get_rng_state()
    (value, _), tangent = value_and_tangent(network, (u, t), (t_u, t_t), labels)
    torch.random.set_rng_state(state)
    (plain, _), difference = finite_difference(network, (u, t), (t_u, t_t), labels, step=1e-5)
    assert torch.equal(value, plain)
    assert (tangent - difference).norm() < 1e-7 * tangent.norm()
    assert not torch.equal(network(u, t, labels)[0], plain), "dropout is on"


def test_time_frequencies_are_at_most_one_radian():
    t = torch.tensor([0.3], dtype=torch.float64)
    embedding = PositionalEmbedding(16)
    _, slope = torch.func.jvp(embedding, (t,), (torch.ones_like(t),))
    assert slope.abs().max() <= 2**0.5


def test_single_pass_records_no_graph_for_the_tangent():
    """Saved activations of one pass with tangent are those of a plain pass: the tangent must not enter the graph."""
    network, (u, t, t_u, t_t), labels = network_and_inputs()
    sizes = []
    for run in (lambda: network(u, t, labels), lambda: value_and_tangent(network, (u, t), (t_u, t_t), labels)):
        saved: list[int] = []

        def pack(x, saved=saved):
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run()
        sizes.append(sum(saved))
    assert sizes[1] <= 1.05 * sizes[0]


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"heads": 5}])
def test_options_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"network\.(patch_size|width)"):
        build_network(DiTOptions(**{"width": 32, "heads": 2, "depth": 1, **change}), 1, 8, 8, 10)
