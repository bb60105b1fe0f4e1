"""Every rule against PyTorch's own forward mode in float64: value, tangent and gradient; and what is refused."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.layers import pixel_norm
from models.tangent.dual import Dual, value_of
from models.tangent.precision import tangent_precision

B, C, H, W = 3, 4, 6, 8
IMAGE, TOKENS, VECTOR = (B, C, H, W), (B, H, W), (B, W)
torch.manual_seed(0)
CONV, CONV_UP, LINEAR = nn.Conv2d(C, 6, 3, padding=1), nn.ConvTranspose2d(C, 2, 2, stride=2), nn.Linear(W, 5)
GROUP, LAYER, PLAIN_LAYER = nn.GroupNorm(2, C), nn.LayerNorm(W), nn.LayerNorm(W, elementwise_affine=False)
for module in (CONV, CONV_UP, LINEAR, GROUP, LAYER):
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
CONSTANT = torch.randn(B, 1, W, dtype=torch.float64)
INDEX = torch.tensor([2, 0])

# name: (function of tensors, shapes of those that carry tangents)
CASES = {
    "linear": (LINEAR, [TOKENS]),
    "conv2d": (CONV, [IMAGE]),
    "conv_transpose2d": (CONV_UP, [IMAGE]),
    "group_norm": (GROUP, [IMAGE]),
    "layer_norm": (LAYER, [TOKENS]),
    "layer_norm without weights": (PLAIN_LAYER, [TOKENS]),
    "pixel_norm": (pixel_norm, [TOKENS]),
    "rms_norm": (lambda x: F.rms_norm(x, (W,)), [TOKENS]),
    "normalize": (lambda x: F.normalize(x, dim=1), [IMAGE]),
    "silu": (F.silu, [TOKENS]),
    "magnitude-preserving silu": (lambda x: F.silu(x) / 0.596, [TOKENS]),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), [TOKENS]),
    "relu": (F.relu, [TOKENS]),
    "sigmoid": (torch.sigmoid, [TOKENS]),
    "tanh": (torch.tanh, [TOKENS]),
    "softmax": (lambda x: x.softmax(1), [TOKENS]),
    "F.softmax": (lambda x: F.softmax(x, dim=-1), [TOKENS]),
    "sines": (lambda x: torch.sin(x) + x.cos() * x.exp(), [TOKENS]),
    "sqrt": (lambda x: (x.square() + 1).sqrt(), [TOKENS]),
    "power": (lambda x: x**3, [TOKENS]),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), [TOKENS]),
    "maximum": (lambda x: x.max(dim=1)[0], [TOKENS]),
    "a + b": (lambda a, b: a + b, [TOKENS, (B, 1, W)]),
    "a - b": (lambda a, b: torch.sub(a, b, alpha=2), [TOKENS, TOKENS]),
    "constants around": (lambda a: (1 - a) * 2 + 3 * a / 4 - CONSTANT * a, [TOKENS]),
    "constant + a": (lambda a: CONSTANT + a, [(B, 1, 1)]),
    "constant - a": (lambda a: CONSTANT - a, [TOKENS]),
    "a * b": (lambda a, b: a * b, [TOKENS, (B, 1, W)]),
    "a * a": (lambda a: a * a, [TOKENS]),
    "a / b": (lambda a, b: a / (2 + b * b), [TOKENS, (B, H, 1)]),
    "1 / a": (lambda a: 1 / (2 + a * a), [TOKENS]),
    "addcmul": (lambda a, b, c: torch.addcmul(a, b, c, value=0.5), [VECTOR, VECTOR, (B, 1)]),
    "addcmul of constants": (lambda b: torch.addcmul(CONSTANT, b, CONSTANT), [TOKENS]),
    "matmul": (lambda a, b: a @ b.mT, [TOKENS, TOKENS]),
    "bmm with a constant": (lambda a: torch.bmm(a, CONSTANT.mT), [TOKENS]),
    "einsum": (lambda a, b: torch.einsum("bhw,bkw->bhk", a, b), [TOKENS, TOKENS]),
    "magnitude-preserving sum": (lambda a, b: torch.lerp(a, b, 0.3) / 0.58**0.5, [IMAGE, IMAGE]),
    "magnitude-preserving concat": (lambda a, b: torch.cat([0.7 * a, 1.2 * b], dim=1), [IMAGE, IMAGE]),
    "concat with a constant": (lambda a: torch.cat([a, torch.ones_like(a[:, :1])], 1), [IMAGE]),
    "stack": (lambda a, b: torch.stack([a, b]), [TOKENS, TOKENS]),
    "chunk": (lambda a: torch.mul(*a.chunk(2, dim=-1)), [TOKENS]),
    "split": (lambda a: a.split([2, 6], -1)[1], [TOKENS]),
    "unbind": (lambda a: a.unbind(0)[1], [TOKENS]),
    "index": (lambda a: a[INDEX, 1:, None], [TOKENS]),
    "reshape": (lambda a: a.reshape(B, H, 2, -1).permute(2, 0, 3, 1).flatten(1).unflatten(1, (4, -1)), [TOKENS]),
    "transposes": (lambda a: a.mT.transpose(0, 1).unsqueeze(0).squeeze(0).contiguous(), [TOKENS]),
    "expand": (lambda a: a[:, None].expand(-1, 5, -1) * CONSTANT, [VECTOR]),
    "sum, mean": (lambda a: a.sum(1) + a.mean(dim=(1,), keepdim=False), [TOKENS]),
    "upsampling": (lambda a: F.interpolate(a, scale_factor=2, mode="nearest"), [IMAGE]),
    "bilinear": (lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"), [IMAGE]),
    "downsampling": (lambda a: F.avg_pool2d(a, 2), [IMAGE]),
    "padding": (lambda a: F.pad(a, (1, 1, 0, 2)), [IMAGE]),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), [IMAGE]),
    "cumsum, flip, roll": (lambda a: a.cumsum(1).flip(2).roll(1, 0), [TOKENS]),
    "where": (lambda a: torch.where(a > 0, a * 2, a.square()), [TOKENS]),
    "dropout that is off": (lambda a: F.dropout(a, 0.5, training=False), [TOKENS]),
}


def carried(function, shapes, dtype=torch.float64):
    primals = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    tangents = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return function(*map(Dual, primals, tangents)), primals, tangents


@pytest.mark.parametrize("name", CASES)
def test_value_tangent_and_gradient(name):
    function, shapes = CASES[name]
    out, primals, tangents = carried(function, shapes)
    expected, t_expected = torch.func.jvp(function, tuple(primals), tuple(tangents))
    torch.testing.assert_close(out.value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.tangent, t_expected.detach(), rtol=1e-10, atol=1e-12)
    assert not out.tangent.requires_grad and out.tangent.norm() > 0
    gradients = torch.autograd.grad(out.value.square().sum(), primals)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), primals), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_tangents_are_not_recorded():
    """The graph of a Dual's value is that of the plain value: as many saved tensors, of the same size."""

    def network(x):
        for _ in range(3):
            x = x + LINEAR(F.silu(pixel_norm(x) * CONSTANT))[..., :1]
        return x

    sizes = []
    x, t_x = torch.randn(2, *TOKENS, dtype=torch.float64)
    for given in (x, Dual(x, t_x)):
        saved: list[int] = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(given)
        sizes.append(saved)
    assert sizes[0] == sizes[1] != []


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout2d])
def test_dropout_draws_the_mask_of_the_plain_function(dropout):
    x, t_x = torch.randn(2, B, 100, 4, 4, dtype=torch.float64)
    state = torch.random.get_rng_state()
    out = dropout(Dual(x, t_x), 0.3)
    torch.random.set_rng_state(state)
    plain = dropout(x, 0.3)
    assert torch.equal(out.value, plain)
    torch.testing.assert_close(out.tangent, torch.where(plain == 0, 0, t_x / 0.7))
    assert 0.2 < (plain == 0).double().mean() < 0.4


def test_comparisons_and_constants_are_plain():
    x = Dual(torch.randn(3), torch.randn(3))
    for plain in (x > 0, torch.zeros_like(x), x.argmax()):
        assert not isinstance(plain, Dual)
    assert x.shape == (3,) and x.dtype == torch.float32 and x.dim() == 1 and len(x) == 3 and not x.requires_grad
    assert isinstance(x, torch.Tensor) and "tangent" in repr(x)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x.add_(1), "in place"),
        (lambda x: x.clip_(-1, 1), "in place"),
        (lambda x: operator.iadd(x, 1), "in place"),
        (lambda x: torch.add(x, 1, out=torch.zeros(3)), "in place"),
        (lambda x: x.detach(), "lose its tangent"),
        (lambda x: x.numpy(), "lose its tangent"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "is_causal"),
    ],
)
def test_what_would_lose_a_tangent_is_refused(function, word):
    with pytest.raises(NotImplementedError, match=word):
        function(Dual(torch.randn(2, 3), torch.randn(2, 3)))


def test_a_graph_is_not_cut():
    x = Dual(torch.randn(3, requires_grad=True), torch.randn(3))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="no_grad"):
        x * 2
    assert not (Dual(x.value.detach(), x.tangent) * 2).value.requires_grad


def test_an_autograd_function_cannot_swallow_a_tangent():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    x = Dual(torch.randn(3, requires_grad=True), torch.randn(3))
    with pytest.raises(NotImplementedError, match="no_grad"):
        Identity.apply(x)


@pytest.mark.parametrize("wide", [None, torch.float32])
def test_precision_of_tangents(wide):
    x = Dual(torch.randn(B, C, H, W), torch.randn(B, C, H, W))
    norm, linear, conv = nn.GroupNorm(2, C).bfloat16(), nn.Linear(W, W).bfloat16(), nn.Conv2d(C, C, 1).bfloat16()
    with tangent_precision(wide):
        low = x.to(torch.bfloat16)
        y = linear(F.silu(norm(low) * low + 1)) / conv(low).exp()
        back = torch.cat([y, low], 1).chunk(2, 1)[0].float()
    assert low.value.dtype == y.value.dtype == torch.bfloat16
    assert low.tangent.dtype == y.tangent.dtype == (wide or torch.bfloat16)
    assert back.value.dtype == back.tangent.dtype == torch.float32
    if wide is not None:
        assert torch.equal(low.tangent, x.tangent)


def test_value_of_is_a_constant():
    x = Dual(torch.randn(3), torch.randn(3))
    assert value_of(x) is x.value and value_of(x.value) is x.value
