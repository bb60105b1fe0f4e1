"""The U-Nets before EDM2 carry exact tangents, block by block, and take what all networks of the project take."""

import pytest
import torch

from models.execution import Execution
from models.layers import Conditioning, held_parameters
from models.registry import build_network
from models.tangent.dual import Dual
from models.tangent.engines import TANGENT_ENGINES, finite_difference
from models.tangent.precision import tangent_precision
from models.unet_layers import Resample
from models.unet_options import ADMOptions, UNetOptions

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,))
FAMILIES = {
    **{name: UNetOptions(name, **SMALL) for name in ("ddpmpp", "ddpmpp-scm", "ncsnpp", "ncsnpp-scm")},
    "adm": ADMOptions(head_channels=4, **SMALL),
    "adm of LSUN": ADMOptions(head_channels=4, modulation="shift", **SMALL),
}
LABELS = torch.tensor([0, 3])


def warm(network, seed=0):
    """No gate is zero: a zero tangent would verify nothing. In float64; random frequencies are made slow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(0.1 if name.endswith("turns") else 1)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.double()


def made(family, told=None, **execution):
    torch.manual_seed(0)
    return warm(build_network(FAMILIES[family], 1, 8, 8, told or Conditioning(3), Execution(**execution)))


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def inputs():
    torch.manual_seed(1)
    return (drawn(2, 1, 8, 8), 1.5 * torch.rand(2).double()), (drawn(2, 1, 8, 8), drawn(2))


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("engine", ["single_pass", "two_pass"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tangents_are_central_differences(family, engine):
    network, (primals, tangents) = made(family), inputs()
    outputs, tangent = TANGENT_ENGINES[engine](network, primals, tangents, LABELS)
    expected, difference = finite_difference(network, primals, tangents, LABELS, step=1e-5)
    torch.testing.assert_close(outputs, expected)
    assert difference.norm() > 0.1 and relative(tangent, difference) < 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_carries_its_tangent(family):
    """Each on features, appended ones and a condition of its own, in directions of all three."""
    network = made(family)
    for block in [*network.encoder, *network.decoder]:
        place = block.place
        side = {"keep": 1, "down": 2, "up": 0.5}[place.resampling] * place.resolution
        shapes = [(2, place.inputs, int(side), int(side)), (2, 32)]
        shapes += [(2, place.appended, place.resolution, place.resolution)] if place.appended else []
        values, directions = ([drawn(*shape) for shape in shapes] for _ in range(2))
        out = block(*map(Dual, values, directions))
        ahead, behind = (block(*(v + s * 1e-5 * d for v, d in zip(values, directions, strict=True))) for s in (1, -1))
        difference = (ahead - behind) / 2e-5
        assert out.shape == (2, place.outputs, place.resolution, place.resolution)
        assert difference.norm() > 0.1 and relative(out.tangent, difference) < 1e-7


@pytest.mark.parametrize("wide", [None, torch.float32])
@pytest.mark.parametrize("family", ["ddpmpp-scm", "ncsnpp", "adm"])
def test_tangents_in_bfloat16(family, wide):
    """Inputs and times stay in float32, whatever the weights."""
    (primals, tangents) = inputs()
    exact = TANGENT_ENGINES["two_pass"](made(family), primals, tangents, LABELS)[1]
    primals, tangents = ([x.float() for x in pair] for pair in (primals, tangents))
    with tangent_precision(wide):
        (value, w), tangent = TANGENT_ENGINES["single_pass"](made(family).bfloat16(), primals, tangents, LABELS)
    assert value.dtype == w.dtype == tangent.dtype == torch.float32
    assert 1e-4 < relative(tangent.double(), exact) < 0.1


@pytest.mark.parametrize("family", ["ncsnpp-scm", "adm"])
def test_checkpointing_changes_no_gradient(family):
    primals, tangents = inputs()
    gradients = []
    for checkpointing in (False, True):
        network = made(family, checkpointing=checkpointing)
        (value, w), tangent = TANGENT_ENGINES["single_pass"](network, primals, tangents, LABELS)
        ((value * tangent).sum() + w.sum()).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_networks_ignore_what_is_new_and_trained_ones_do_not(family):
    (u, t), _ = inputs()
    more = {"guidance": drawn(2), "end": 0.5 * t, "augmentation": drawn(2, 9)}
    told = Conditioning(3, guided=True, jumps=True, augmented=True)
    plain = made(family)
    network = build_network(FAMILIES[family], 1, 8, 8, told).double()
    new = set(network.load_state_dict(plain.state_dict(), strict=False).missing_keys)
    assert {name.split(".")[1] for name in new} == set(more)
    torch.testing.assert_close(network(u, t, LABELS, **more)[0], plain(u, t, LABELS)[0])
    warm(network)
    before = network(u, t, LABELS, **more)[0]
    for name, value in more.items():
        assert not torch.allclose(before, network(u, t, LABELS, **{**more, name: value + 1})[0])
    assert not torch.allclose(before, network(u, t, 3 - LABELS, **more)[0])


def test_random_frequencies_stay_what_they_are():
    network, ((u, t), _) = made("ncsnpp"), inputs()
    network(u, t, LABELS)[0].square().sum().backward()
    turns = network.condition.time.turns
    assert held_parameters(network) == {"condition.time.turns"} and not held_parameters(made("ddpmpp"))
    assert turns.std() > 0.1 and torch.equal(turns.grad, torch.zeros_like(turns))
    slow = build_network(UNetOptions("ncsnpp", time_scale=0.02, channels=128), 1, 32, 32, Conditioning(1))
    assert slow.condition.time.turns.std().item() == pytest.approx(0.02, rel=0.3)


def test_filters_keep_constants_and_sizes():
    flat = torch.ones(1, 2, 8, 8)
    for taps in ((1, 1), (1, 3, 3, 1)):
        for how, side in (("down", 4), ("up", 16)):
            out = Resample(how, taps)(flat)
            assert out.shape == (1, 2, side, side)
            torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.ones(1, 2, side - 2, side - 2))


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("multipliers", lambda: made("ddpmpp") and build_network(FAMILIES["ddpmpp"], 1, 9, 9, Conditioning(3))),
        ("head_channels", lambda: build_network(ADMOptions(head_channels=7, **SMALL), 1, 8, 8, Conditioning(3))),
        ("channels", lambda: UNetOptions("ddpmpp", channels=6)),
        ("blocks", lambda: ADMOptions(blocks=0)),
        ("dropout", lambda: ADMOptions(dropout=1.0)),
        ("time_scale", lambda: UNetOptions("ncsnpp", time_scale=0.0)),
    ],
)
def test_options_that_do_not_fit_are_refused(key, make):
    with pytest.raises(ValueError, match=rf"network\.{key}"):
        make()
