"""Attention with tangents: every implementation against PyTorch's forward mode of the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import attention, chosen_backend
from models.attention.gradient import _blocked_gradient, has_tensor_cores, value_gradient
from models.attention.sweeps import blocked, reference
from models.tangent.dual import Dual

BACKENDS = ("reference", "blocked")


def plain(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def inputs(length, dim=16, dtype=torch.float64, logits=1.0):
    q, k, v, *tangents = torch.randn(6, 2, 3, length, dim, dtype=torch.float64)
    return [x.to(dtype) for x in (logits * q, k, v)], [x.to(dtype) for x in tangents]


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, 256, 300])
@pytest.mark.parametrize("logits", [1.0, 80.0])
def test_value_tangent_and_gradient(backend, length, logits):
    """Lengths that do not divide the blocks, and logits of hundreds."""
    primals, tangents = inputs(length, logits=logits)
    primals = [x.requires_grad_() for x in primals]
    out = attention(*map(Dual, primals, tangents), backend)
    expected, t_expected = torch.func.jvp(plain, tuple(primals), tuple(tangents))
    torch.testing.assert_close(out.value, expected, rtol=1e-10, atol=1e-12)
    assert error(out.tangent, t_expected.detach()) < 1e-10 or length == 1
    gradients = torch.autograd.grad(out.value.square().sum(), primals)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), primals), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_low_precision_accumulates_in_float32(backend, dtype, bound):
    primals, tangents = inputs(200, dtype=dtype, logits=3.0)
    out = attention(*map(Dual, primals, tangents), backend)
    exact = torch.func.jvp(plain, *(tuple(x.double() for x in xs) for xs in (primals, tangents)))
    assert out.value.dtype == out.tangent.dtype == dtype
    assert error(out.value, exact[0]) < bound and error(out.tangent, exact[1]) < bound


def test_strided_operands():
    """As they come out of one linear layer for q, k and v."""
    qkv, t_qkv = torch.randn(2, 2, 40, 3, 3, 16, dtype=torch.float64)
    primals, tangents = (tuple(x.permute(2, 0, 3, 1, 4)) for x in (qkv, t_qkv))
    out = attention(*map(Dual, primals, tangents))
    expected, t_expected = torch.func.jvp(plain, primals, tangents)
    torch.testing.assert_close(out.value, expected)
    torch.testing.assert_close(out.tangent, t_expected)


def test_operands_without_a_tangent():
    (q, k, v), (t_q, *_) = inputs(20)
    out = attention(Dual(q, t_q), k, v)
    _, t_expected = torch.func.jvp(lambda x: plain(x, k, v), (q,), (t_q,))
    torch.testing.assert_close(out.tangent, t_expected)


def test_stock_function_has_the_same_rule():
    primals, tangents = inputs(20)
    duals = list(map(Dual, primals, tangents))
    assert torch.equal(F.scaled_dot_product_attention(*duals).tangent, attention(*duals).tangent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_without_a_fused_kernel(dtype):
    primals, _ = inputs(300, dtype=dtype)
    out, logsumexp = blocked(*primals)
    gradient = torch.randn_like(out)
    exact = [x.double().requires_grad_() for x in primals]
    expected = torch.autograd.grad(plain(*exact), exact, gradient.double())
    bound = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 3e-2)
    for implementation in (_blocked_gradient, value_gradient):
        for ours, theirs in zip(implementation(gradient, *primals, out, logsumexp), expected, strict=True):
            assert ours.dtype == dtype and error(ours, theirs) < bound


def test_blocks_do_not_change_the_result():
    primals, tangents = inputs(100)
    whole = blocked(*primals, *tangents)
    for rows in (1, 32, 99):
        for ours, theirs in zip(blocked(*primals, *tangents, rows=rows), whole, strict=True):
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(reference(*primals, *tangents), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(blocked(*primals), (whole[0], whole[2]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were one; what asked before forgets."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for function in (has_tensor_cores, chosen_backend):
        function.cache_clear()
    yield torch.device("cuda", 7)
    for function in (has_tensor_cores, chosen_backend):
        function.cache_clear()


def test_choice(a_gpu):
    assert chosen_backend(torch.device("cpu"), torch.bfloat16, 64) == "blocked"
    assert chosen_backend(a_gpu, torch.bfloat16, 72) == chosen_backend(a_gpu, torch.float32, 64) == "triton"
    assert chosen_backend(a_gpu, torch.float32, 128) == chosen_backend(a_gpu, torch.float64, 64) == "blocked"
    assert chosen_backend(a_gpu, torch.bfloat16, 8) == chosen_backend(a_gpu, torch.bfloat16, 320) == "blocked"
    assert chosen_backend(a_gpu, torch.bfloat16, 64, "reference") == "reference"


def test_choice_on_an_old_gpu(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen_backend(a_gpu, torch.float16, 64) == "blocked"


def test_gradient_on_a_gpu_is_the_fused_kernel(a_gpu):
    """Without one: PyTorch itself checks the call on tensors that have no memory."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Calls():
        q, k, v, out, gradient = (torch.empty(2, 4, 128, 72, device="cuda", dtype=torch.bfloat16) for _ in range(5))
        logsumexp = torch.empty(2, 4, 128, device="cuda")
        gradients = value_gradient(gradient, q, k, v, out, logsumexp)
    assert [g.shape for g in gradients] == [q.shape] * 3 and gradients[0].device.type == "cuda"
    assert "aten::_scaled_dot_product_flash_attention_backward" in called
