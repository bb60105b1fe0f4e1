"""The contact with DeepSpeed's internals fails loudly where they are others; `tests/distributed` uses all of it."""

from datetime import timedelta

import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from torch import nn

from models.tangent.dual import Dual
from sctrain.errors import UserError
from sctrain.zero.internals import Zero3, carry_tangents, check_deepspeed, set_default_timeout


@pytest.mark.parametrize("version", ["0.16.4", "0.19.7", "0.20.0", "1.0"])
def test_unknown_versions_are_refused_with_the_mend(version):
    with pytest.raises(UserError, match=rf"DeepSpeed {version} .*pip install 'deepspeed>=0.19.8,<0.20'"):
        check_deepspeed(version)


def test_the_installed_version_is_known():
    check_deepspeed()
    check_deepspeed("0.19.9+cu130")


def test_modules_without_the_hooks_are_noticed():
    module = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="pre_bwd_fn"):
        carry_tangents(module)
    module.pre_bwd_fn = lambda x: x  # no autograd.Function any more
    with pytest.raises(AssertionError, match="pre_bwd_fn"):
        carry_tangents(module)
    with pytest.raises(AttributeError, match="_z3_optimizer"):
        Zero3(module)


def test_a_hook_acts_on_the_value_and_lets_the_tangent_pass():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    module = nn.Identity()
    module.pre_bwd_fn = module.post_bwd_fn = Doubled
    carry_tangents(module)
    x, t_x = torch.ones(3, requires_grad=True), torch.rand(3)
    passed = module.pre_bwd_fn.apply(Dual(x, t_x))
    passed.value.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0)) and passed.tangent is t_x
    assert torch.equal(module.post_bwd_fn.apply(x), x)


def test_default_timeout_is_where_torch_looks_for_it(monkeypatch):
    monkeypatch.setattr(c10d, "default_pg_timeout", c10d.default_pg_timeout)
    set_default_timeout(timedelta(seconds=7))
    assert c10d.default_pg_timeout == timedelta(seconds=7)
