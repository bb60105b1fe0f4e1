"""DDPM++, NCSN++ and ADM are the published ones: their parameters, and their functions with published weights."""

import pytest
import torch
from published_unet import PublishedUNet

from models.layers import Conditioning
from models.registry import build_network
from models.unet_options import ADMOptions, ADMSize, UNetOptions
from models.unet_published import from_edm, from_openai

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,))
FAMILIES = {
    "ddpmpp": (UNetOptions("ddpmpp", **SMALL), PublishedUNet(song=True)),
    "ncsnpp": (UNetOptions("ncsnpp", **SMALL), PublishedUNet(song=True, taps=(1, 3, 3, 1))),
    "adm": (ADMOptions(head_channels=4, **SMALL), PublishedUNet(song=False)),
}


def on_meta(options, side, classes, augmented=False):
    with torch.device("meta"):
        return build_network(options, 3, side, side, Conditioning(classes, augmented=augmented))


@pytest.mark.parametrize(
    ("options", "side", "classes", "published"),
    [
        (UNetOptions("ddpmpp"), 32, 1, 55_733_891),  # EDM, CIFAR-10 without classes, augmented: 55.7 M
        (UNetOptions("ncsnpp"), 32, 1, 56_397_827),  # the same: 56.4 M
        (ADMSize("adm-imagenet64"), 64, 1000, 295_899_267),  # EDM and OpenAI: 295.9 M
        (ADMSize("adm-lsun256"), 256, 1, 526_304_771),  # OpenAI: 526.3 M
    ],
)
def test_parameters_are_the_published_ones_and_what_a_run_adds(options, side, classes, published):
    """Besides: the weighting of losses, a row for "no class", and frequencies, which are no parameters there."""
    network = on_meta(options, side, classes, augmented=side == 32)
    weighting = network.weighting.out.weight.numel() + 1
    rows = 1 if classes > 1 else 2
    turns = 128 if options.name == "ncsnpp" else 0
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count - weighting - rows * network.condition.label.embedding_dim - turns == published


@pytest.mark.parametrize("told", ["nothing", "augmentation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_weights_give_the_published_function(family, told):
    options, published = FAMILIES[family]
    torch.manual_seed(0)
    u, c_noise, labels = torch.randn(3, 3, 8, 8).double(), torch.randn(3).double(), torch.tensor([0, 2, 3])
    one_hot = torch.nn.functional.one_hot(labels, 4)[:, :3].double()  # the last is of no class
    augmentation = torch.randn(3, 9).double() if told == "augmentation" else None
    expected = published(u, c_noise, one_hot, augmentation)
    network = build_network(options, 3, 8, 8, Conditioning(3, augmented=told == "augmentation")).double()
    weights = from_edm(published.weights, network, 8)
    assert network.load_state_dict(weights, strict=False).missing_keys == ["weighting.out.weight", "weighting.out.bias"]
    torch.testing.assert_close(network(u, c_noise, labels, augmentation=augmentation)[0], expected)


def test_a_published_network_without_classes_is_told_nothing_by_ours():
    options, published = FAMILIES["adm"]
    published(*(torch.zeros(shape).double() for shape in ((1, 3, 8, 8), (1,), (1, 3))))
    network = build_network(options, 3, 8, 8, Conditioning(1))
    without = {name: weight for name, weight in published.weights.items() if name != "map_label.weight"}
    assert not from_edm(without, network, 8)["condition.label.weight"].any()
    with pytest.raises(KeyError, match=r"enc\.4x4_down\.norm0\.weight"):
        from_edm({k: v for k, v in without.items() if "4x4_down" not in k}, network, 8)


class Names(dict):
    """Stands for a file of weights, and notes what is asked for."""

    def __missing__(self, name):
        self[name] = torch.zeros(2, 1 if "norm" in name or ".0." in name else 2)
        return self[name]


def test_openais_names():
    """Of the released U-Net for LSUN, whose blocks that double stand behind others; 18 outputs of the encoder."""
    asked = Names()
    from_openai(asked, on_meta(ADMSize("adm-lsun256"), 256, 1))
    assert len({name.split(".")[1] for name in asked if name.startswith("input_blocks")}) == 18
    assert len({name.split(".")[1] for name in asked if name.startswith("output_blocks")}) == 18
    for name in (
        *("input_blocks.0.0.weight", "input_blocks.13.0.skip_connection.weight", "input_blocks.13.1.qkv.weight"),
        *("middle_block.0.in_layers.0.weight", "middle_block.1.proj_out.bias", "middle_block.2.out_layers.3.bias"),
        *("output_blocks.2.1.qkv.weight", "output_blocks.2.2.in_layers.2.weight"),  # behind attention
        *("output_blocks.14.1.in_layers.2.weight", "output_blocks.17.0.emb_layers.1.weight", "out.2.bias"),
    ):
        assert name in asked
    assert "label_emb.weight" not in asked and "input_blocks.12.1.qkv.weight" not in asked
