"""Networks without weights: what is drawn for a parameter is what its constructor asks for, whatever else there is."""

import pytest
import torch
from torch import Tensor, nn

from models.dit_options import DiTOptions
from models.execution import Execution
from models.layers import Conditioning
from models.registry import build_network
from sctrain.blueprint import Blueprint, InitialValues


class Odd(nn.Module):
    """Ways of setting weights, by itself and from outside."""

    def __init__(self):
        super().__init__()
        self.zeroed = nn.Linear(3, 4)
        nn.init.zeros_(self.zeroed.weight)
        self.mixed = nn.Parameter(torch.cat([torch.ones(3), torch.randn(500)]) * torch.tensor(2.0))
        self.scaled = nn.Parameter(torch.randn(40, 50) / torch.arange(1.0, 51.0))
        self.of_list = nn.Parameter(torch.empty(3))
        self.partly = nn.Parameter(torch.empty(6, 2))
        self.scalar = nn.Parameter(torch.full([], 0.25))
        with torch.no_grad():
            self.of_list.copy_(torch.tensor([1.0, 2.0, 3.0]))
            self.partly.fill_(7.0)
            self.partly[2:4, 1].zero_()
            self.partly.view(-1)[-1:].add_(1.0)
        self.register_buffer("ramp", torch.linspace(0, 1, 5) ** 2)


class Shuffled(Odd):
    """The same parameters, made in another order and among others."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(2, 2)
        for name in ("mixed", "zeroed"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, value)


def drawn(make, seed=0) -> dict[str, Tensor]:
    blueprint = Blueprint(make)
    return dict(blueprint.whole(InitialValues(blueprint, seed)).named_parameters())


def test_what_the_constructor_sets_is_there():
    weights = drawn(Odd)
    assert not weights["zeroed.weight"].any() and 0 < weights["zeroed.bias"].abs().max() < 3**-0.5
    assert weights["mixed"][:3].tolist() == [2, 2, 2] and weights["mixed"][3:].std().item() == pytest.approx(2, rel=0.1)
    assert (weights["scaled"] * torch.arange(1.0, 51.0)).std().item() == pytest.approx(1, rel=0.1)
    assert weights["of_list"].tolist() == [1, 2, 3] and weights["scalar"].item() == 0.25
    expected = torch.full((6, 2), 7.0)
    expected[2:4, 1] = 0
    expected[5, 1] = 8
    assert torch.equal(weights["partly"], expected)
    assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in weights.values())


def test_values_depend_on_seed_and_name_alone():
    torch.manual_seed(3)
    first, state = drawn(Odd), torch.get_rng_state()
    torch.rand(7)
    again, other, shuffled = drawn(Odd), drawn(Odd, seed=1), drawn(Shuffled)
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], shuffled[name]) for name in first)
    assert not torch.equal(first["mixed"], other["mixed"])
    assert not torch.equal(first["mixed"][3:53], first["scaled"][0])
    torch.manual_seed(3)
    drawn(Odd)
    assert torch.equal(torch.get_rng_state(), state), "the global random numbers are not touched"


def test_pieces_are_those_of_the_whole():
    blueprint = Blueprint(Odd)
    values, whole = InitialValues(blueprint, 0), blueprint.draw("scaled", 0).flatten()
    assert torch.equal(values.read("scaled", 17, 1003), whole[17:1003])


def test_buffers_are_real_and_never_random():
    assert torch.equal(Blueprint(Odd).skeleton().ramp, torch.linspace(0, 1, 5) ** 2)

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("noise", torch.randn(3))

    with pytest.raises(AssertionError, match="may not be random"):
        Blueprint(Random).skeleton()


def test_networks_of_the_project_need_nothing_of_it():
    """As they are with torch's own random numbers: constants equal, the others of the same size."""

    def make():
        told = Conditioning(10, guided=True, augmented=True)
        return build_network(DiTOptions(width=64, depth=1, heads=2), 3, 8, 8, told, Execution())

    weights = drawn(make)
    for name, plain in make().named_parameters():
        assert weights[name].shape == plain.shape
        if not plain.any():
            assert not weights[name].any()
        elif plain.numel() > 1000:
            assert weights[name].std().item() == pytest.approx(plain.std().item(), rel=0.1)
