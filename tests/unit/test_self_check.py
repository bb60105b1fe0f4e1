"""The check of tangents finds wrong, lost and zero ones, names their block, and leaves the random state alone."""

import copy

import pytest
import torch

from models.dit_options import DiTOptions
from models.layers import Conditioning
from models.registry import build_network
from models.tangent import dual
from models.tangent.dual import Dual, tangent_rule, value_of
from models.tangent.engines import finite_difference, single_pass, two_pass
from sctrain.config.schema import GuardConfig
from sctrain.errors import UserError
from sctrain.guard import check_tangents
from sctrain.parameterization import Parameterization
from sctrain.self_check import Arguments, Verdict, _block, verify

GUARD = GuardConfig()


class Alone:
    def sum(self, values):
        return values.clone()


def network(dropout=0.0, fresh=False, told=Conditioning(10)):  # noqa: B008
    torch.manual_seed(1)
    made = build_network(DiTOptions(width=32, depth=2, heads=2, dropout=dropout), 1, 8, 8, told)
    with torch.no_grad():
        for parameter in made.parameters() if not fresh else ():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def arguments():
    torch.manual_seed(2)
    u, t_u = torch.randn(2, 3, 1, 8, 8)
    return Arguments((u, torch.rand(3)), (0.5 * t_u, torch.rand(3)), (torch.tensor([1, 2, 10]),))


def verdict_on(module, engine=single_pass, running=None):
    return verify(engine, running or module, module, module, arguments(), Alone())


@pytest.mark.parametrize("engine", [single_pass, two_pass])
def test_right_tangents_pass_with_dropout_on(engine):
    verdict = verdict_on(network(dropout=0.2), engine)
    assert list(verdict.blocks) == ["embed", "condition", "blocks.0", "blocks.1", "norm", "head", "network"]
    assert 0 < verdict.worst[1] < 2e-3 and not verdict.unverified and not verdict.running
    assert "7 blocks, worst error" in str(verdict)
    check_tangents(verdict, GUARD)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("engine", [single_pass, two_pass])
def test_what_a_network_is_told_beside_time_and_class_has_no_tangent(engine, guided):
    """The embedding of time is called for the other numbers too, and what is not told is None."""
    module = network(told=Conditioning(10, guided=guided, jumps=True))
    inputs = arguments()
    scale = torch.tensor([1.0, 1.5, 2.0]) if guided else None
    inputs = Arguments(inputs.primals, inputs.direction, (*inputs.conditions, scale, torch.rand(3)))
    verdict = verify(engine, module, module, module, inputs, Alone())
    assert len(verdict.blocks) == 7 and 0 < verdict.worst[1] < 2e-3 and not verdict.unverified


def test_the_network_is_verified_as_it_is_used():
    """Its output, anchored at sigma_min, is another function than the module's."""
    module = network()
    anchored = Parameterization(0.5, sigma_min=0.05).of(module)
    verdict = verify(single_pass, anchored, anchored, module, arguments(), Alone())
    assert len(verdict.blocks) == 7 and 0 < verdict.worst[1] < 2e-3
    broken = Parameterization(0.5, sigma_min=0.1).of(module)
    engine = lambda _, *rest: single_pass(broken, *rest)  # noqa: E731
    assert verify(engine, anchored, anchored, module, arguments(), Alone()).blocks["network"] > 0.02


def test_the_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    module, inputs = network(dropout=0.2), arguments()
    torch.random.set_rng_state(state)
    verify(single_pass, module, module, module, inputs, Alone())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_wrong_rule_is_found_and_the_run_refused(monkeypatch):
    monkeypatch.setattr(dual, "RULES", dict(dual.RULES))
    tangent_rule("silu")(lambda out, x, inplace=False: 0.9 * x.tangent)
    verdict = verdict_on(network())
    assert verdict.blocks["embed"] < 1e-3 < 0.02 < verdict.blocks["blocks.1"]
    with pytest.raises(UserError, match=r"tangent of (blocks|condition|network|norm|head).*guard.tangent_error"):
        check_tangents(verdict, GUARD)


def test_a_lost_tangent_is_found():
    class Lossy(torch.nn.Module):
        def forward(self, u, t, labels):
            return torch.sin(value_of(u)) * t[:, None, None, None], t

    with pytest.raises(AssertionError, match=r"an operation in \['inner'\] lost the tangent"):

        class Outer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = torch.nn.Sequential()
                self.inner.forward = lambda u: torch.sin(value_of(u))

            def forward(self, u, t, labels):
                return self.inner(u) * t[:, None, None, None], t

        verdict_on(Outer())
    assert verdict_on(Lossy()).worst[1] > 0.1


def test_zero_tangents_are_not_verified():
    verdict = verdict_on(network(fresh=True))
    assert verdict.unverified == ["blocks.0", "blocks.1", "head", "network"]
    assert "not verified, for their tangents are zero: blocks.0, blocks.1, head, network" in str(verdict)
    check_tangents(verdict, GUARD)


def test_the_running_precision_is_compared_with_float32():
    module = network()
    verdict = verdict_on(module, running=copy.deepcopy(module).bfloat16())
    assert 1e-4 < verdict.running["running precision"] < 0.05
    assert "error of the running precision" in str(verdict)
    with pytest.raises(UserError, match=r"running precision differs by .*guard.precision_error"):
        check_tangents(verdict, GuardConfig(precision_error=1e-4))
    fresh = network(fresh=True)
    assert verdict_on(fresh, running=copy.deepcopy(fresh).bfloat16()).running == {"running precision": None}


def test_engines_that_carry_nothing_through_the_blocks_are_checked_at_the_end():
    verdict = verdict_on(network(), finite_difference)
    assert list(verdict.blocks) == ["network"] and 0 <= verdict.worst[1] < 2e-3


def test_names_of_blocks():
    assert _block("blocks.3.attention_norm.modulation") == "blocks.3" and _block("embed") == "embed"
    assert _block("") == "network" and _block("condition.hidden") == "condition"


def test_worst_of_nothing():
    assert Verdict({"a": None}).worst == ("", 0.0)
    assert isinstance(Dual(torch.zeros(1), torch.zeros(1)), torch.Tensor)
