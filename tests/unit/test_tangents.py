"""Whole networks through each engine, with and without checkpointing, against float64 autodiff and a plain pass."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import Conditioning, PositionalEmbedding
from models.registry import build_network
from models.tangent.dual import Dual
from models.tangent.engines import TANGENT_ENGINES, finite_difference, single_pass
from models.tangent.precision import tangent_precision

B = 3
EXACT = ("single_pass", "two_pass")


def network_and_inputs(dtype=torch.float64, dropout=0.0, checkpointing=False, name="dit"):
    """No gate is zero: a zero tangent would verify nothing."""
    torch.manual_seed(0)
    options = DiTOptions(name, width=32, depth=3, heads=2, patch_size=2, dropout=dropout)
    network = build_network(options, 1, 8, 8, Conditioning(10), execution=Execution(checkpointing=checkpointing))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    u, t, t_u, t_t = torch.randn(B, 1, 8, 8), 1.5 * torch.rand(B), torch.randn(B, 1, 8, 8), torch.rand(B)
    u, t, t_u, t_t = (x.to(dtype) for x in (u, t, t_u, t_t))
    return network.to(dtype), ((u, t), (t_u, t_t), torch.tensor([0, 9, 10]))


def gradients(network, outputs):
    value, w = outputs
    network.zero_grad()
    (value.square().sum() + w.sum()).backward()
    return [parameter.grad for parameter in network.parameters()]


def relative(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def autodiff(network, primals, tangents, labels):
    """PyTorch's own forward mode, which knows nothing of ours."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda *x: network(*x, labels)[0], primals, tangents)[1].detach()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["dit", "dit-zero"])
@pytest.mark.parametrize("engine", TANGENT_ENGINES)
def test_tangent_equals_float64_autodiff_and_gradients_those_of_a_plain_pass(engine, name, checkpointing):
    plain, arguments = network_and_inputs(name=name)
    network, _ = network_and_inputs(checkpointing=checkpointing, name=name)
    outputs, tangent = TANGENT_ENGINES[engine](network, *arguments)
    expected = plain(*arguments[0], arguments[2])
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not tangent.requires_grad
    assert relative(tangent, autodiff(plain, *arguments)) < (1e-12 if engine in EXACT else 1e-5)
    for ours, theirs in zip(gradients(network, outputs), gradients(plain, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", EXACT)
def test_network_tangent_in_float32(engine):
    network, arguments = network_and_inputs()
    exact = autodiff(network, *arguments)
    single, ((u, t), (t_u, t_t), labels) = network_and_inputs(torch.float32)
    assert relative(TANGENT_ENGINES[engine](single, (u, t), (t_u, t_t), labels)[1], exact) < 1e-5


@pytest.mark.parametrize("wide", [None, torch.float32])
def test_network_tangent_in_bfloat16(wide):
    """Inputs and times stay in float32, whatever the weights; see docs/tangents.md for trained networks."""
    reference, in_double = network_and_inputs()
    exact = autodiff(reference, *in_double)
    network, arguments = network_and_inputs(torch.float32)
    with tangent_precision(wide):
        (value, w), tangent = single_pass(network.bfloat16(), *arguments)
    assert value.dtype == w.dtype == tangent.dtype == torch.float32
    assert 1e-4 < relative(tangent, exact) < 0.05


def test_time_stays_in_float32_where_weights_are_bfloat16():
    """Its embedding is that of a float32 network with the same rounded weights, not a rounded one."""
    network, ((_, t), _, labels) = network_and_inputs(torch.float32)
    condition = network.bfloat16().condition(t, labels, None, None, None)
    assert condition.dtype == torch.float32
    torch.testing.assert_close(condition, network.float().condition(t, labels, None, None, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", TANGENT_ENGINES)
def test_dropout_masks_agree_bit_for_bit(engine, checkpointing):
    """Value, tangent and gradient belong to one mask: that of a plain pass from the same random state."""
    network, arguments = network_and_inputs(dropout=0.3, checkpointing=checkpointing)
    plain, _ = network_and_inputs(dropout=0.3)
    state = torch.random.get_rng_state()
    outputs, tangent = TANGENT_ENGINES[engine](network, *arguments)
    after = torch.random.get_rng_state()
    ours = gradients(network, outputs)
    assert torch.equal(after, torch.random.get_rng_state()), "backward leaves the generator alone"
    torch.random.set_rng_state(state)
    expected, difference = finite_difference(plain, *arguments, step=1e-5)
    assert torch.equal(outputs[0] == 0, expected[0] == 0)
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-12, atol=1e-12)
    assert relative(tangent, difference) < (1e-7 if engine in EXACT else 1e-4)
    for mine, theirs in zip(ours, gradients(plain, expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(plain(*arguments[0], arguments[2])[0], expected[0]), "dropout is on"


def test_accumulated_gradients_are_those_of_the_whole_batch():
    for checkpointing in (False, True):
        network, ((u, t), (t_u, t_t), labels) = network_and_inputs(checkpointing=checkpointing)
        outputs, tangent = single_pass(network, (u, t), (t_u, t_t), labels)
        (outputs[0] * tangent).sum().backward()
        whole = [parameter.grad for parameter in network.parameters()]
        network.zero_grad()
        for i in range(B):
            cut = slice(i, i + 1)
            (value, _), part = single_pass(network, (u[cut], t[cut]), (t_u[cut], t_t[cut]), labels[cut])
            (value * part).sum().backward()
        for parameter, expected in zip(network.parameters(), whole, strict=True):
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_tangent_leaves_nothing_for_backward(checkpointing):
    """As many saved elements as a plain pass keeps (the flash kernel's statistics included)."""
    network, ((u, t), tangents, labels) = network_and_inputs(checkpointing=checkpointing)
    sizes = []
    for run in (lambda: network(u, t, labels), lambda: single_pass(network, (u, t), tangents, labels)):
        saved: list[int] = []

        def pack(x, saved=saved):
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run()
        sizes.append(sum(saved))
    assert 0 < sizes[1] <= 1.02 * sizes[0]


def test_checkpointed_blocks_are_evaluated_again_without_tangents():
    """Backward makes the value again, the tangent never."""
    network, arguments = network_and_inputs(checkpointing=True)
    seen: list[bool] = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(isinstance(inputs[0], Dual)))
    outputs, _ = single_pass(network, *arguments)
    outputs[0].sum().backward()
    assert seen == [True] * 3 + [False] * 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every input's
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_never_drop_a_tangent(checkpointing):
    """Duals pass compiled blocks by, bit for bit as without; plain values go through compiled code."""
    eager, ((u, t), tangents, labels) = network_and_inputs(torch.float32, checkpointing=checkpointing)
    compiled, _ = network_and_inputs(torch.float32)
    compiled.execution = Execution(checkpointing=checkpointing, compiled=True)
    torch._dynamo.reset()
    counters.clear()
    outputs, tangent = single_pass(compiled, (u, t), tangents, labels)
    expected, t_expected = single_pass(eager, (u, t), tangents, labels)
    assert torch.equal(tangent, t_expected) and t_expected.norm() > 0 and torch.equal(outputs[0], expected[0])
    assert not counters["stats"], "nothing was compiled for the tangent"
    for ours, theirs in zip(gradients(compiled, outputs), gradients(eager, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(u, t, labels)[0], eager(u, t, labels)[0], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0, "plain values are compiled"
    assert set(compiled.state_dict()) == set(eager.state_dict())


def test_a_network_that_ignores_its_inputs_has_no_tangent():
    constant = torch.ones(2, requires_grad=True)
    (value,), tangent = single_pass(lambda u: (constant,), (torch.zeros(2),), (torch.ones(2),))
    assert value is constant and torch.equal(tangent, torch.zeros(2))


def test_a_guided_network_starts_as_its_teacher_and_learns_to_listen():
    options = DiTOptions(width=32, depth=2, heads=2)
    teacher, student = (build_network(options, 1, 8, 8, Conditioning(10, guided)) for guided in (False, True))
    missing = student.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    assert missing == ["condition.guidance.weight", "condition.guidance.bias"]
    u, t, labels, scale = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]), torch.tensor([1.0, 2.0])
    assert torch.equal(student(u, t, labels, scale)[0], teacher(u, t, labels)[0])
    for module in (student.head, student.blocks[0].down, student.condition.guidance):
        torch.nn.init.normal_(module.weight, std=0.1)
    assert not torch.equal(student(u, t, labels, scale)[0], student(u, t, labels, 2 * scale)[0])
    with pytest.raises(AssertionError, match="guided network"):
        student(u, t, labels)


def test_time_frequencies_are_at_most_one_radian():
    t = torch.tensor([0.3], dtype=torch.float64)
    embedding = PositionalEmbedding(16)
    _, slope = torch.func.jvp(embedding, (t,), (torch.ones_like(t),))
    assert slope.abs().max() <= 2**0.5


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"heads": 5}])
def test_options_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"network\.(patch_size|width)"):
        build_network(DiTOptions(**{"width": 32, "heads": 2, "depth": 1, **change}), 1, 8, 8, Conditioning(10))
