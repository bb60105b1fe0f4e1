"""Every named network is as large as its paper says, and costs as much; `sctrain models` says so.

Of EDM2 the smallest stands for all: test_edm2.py has the others.
"""

import json
from typing import get_args, get_type_hints

import pytest

from models.published import PUBLISHED
from models.registry import NetworkOptions
from sctrain import cli
from sctrain.commands import models

FREE = {"dit", "dit-zero", "adm", "edm2", "edm2-scm"}  # families whose free form is no published network
# (millions of parameters, billions of multiply-adds). Of the U-Nets before EDM2: EDM's and OpenAI's code counted, and
# EDM2's figure 1 for ADM's multiply-adds. DiT's multiply-adds hold for our blocks, its parameters do not.
PAPERS = {
    "ddpmpp": (55.7, None),
    "ncsnpp": (56.4, None),
    "adm-imagenet64": (295.9, 110),
    "adm-lsun256": (526.3, None),
    **{
        f"{family}-{name}": (None, gflop)
        for family in ("dit", "dit-zero")
        for name, gflop in zip("s b l xl".split(), (6.06, 23.01, 80.71, 118.64), strict=True)
    },
    "edm2-xs": (124.7, 45.5),
}
# adaLN-Zero has six vectors of the width per block and a layer for each block; an adaptive double normalisation four.
DIT = {"dit-s": (33.0, 29.4), "dit-b": (130.5, 116.5), "dit-l": (458.1, 408.2), "dit-xl": (675.1, 601.5)}


# What two modulating vectors per channel cost in place of one; their papers print no count.
SCM = {"ddpmpp-scm": 60.1, "ncsnpp-scm": 60.7}


@pytest.fixture(scope="module")
def rows():
    lines, listed = [], {name: PUBLISHED[name] for name in (*PAPERS, *SCM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "PUBLISHED", listed)
        patch.setattr("builtins.print", lines.append)
        assert models.run(cli.parse(["models", "--json"])) == 0
    return {row["name"]: row for row in json.loads(lines[0])}


def test_every_name_is_listed():
    names = {name for options in get_args(NetworkOptions) for name in _literals(get_type_hints(options)["name"])}
    assert set(PUBLISHED) == names - FREE


def _literals(hint):
    """The words of a Literal, or of a union of them."""
    return [word for part in get_args(hint) for word in (_literals(part) if get_args(part) else [part])]


@pytest.mark.parametrize("name", PAPERS)
def test_a_network_has_the_published_size(rows, name):
    parameters, gflop = PAPERS[name]
    if parameters is not None:
        assert f"{rows[name]['parameters'] / 1e6:.1f}" == f"{parameters}"
    if gflop is not None:
        assert rows[name]["gflop"] == pytest.approx(gflop, rel=0.02)


@pytest.mark.parametrize("name", SCM)
def test_the_form_of_scm_is_larger_by_its_shifts(rows, name):
    assert f"{rows[name]['parameters'] / 1e6:.1f}" == f"{SCM[name]}"


@pytest.mark.parametrize("name", DIT)
def test_our_dits_are_smaller_by_what_their_normalisation_saves(rows, name):
    published, ours = DIT[name]
    assert f"{rows[name]['parameters'] / 1e6:.1f}" == f"{ours}"
    free = PUBLISHED[name].options.free
    saved = 2 * free.depth * free.width * (free.width + 1)  # two of six modulating vectors per block
    assert published - ours == pytest.approx(saved / 1e6, abs=1.5)


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_a_dit_as_published_has_its_parameters(rows, size):
    """With the half of the head that says variances and the fixed places of tokens, without the weight of losses."""
    free = PUBLISHED[f"dit-zero-{size}"].options.free
    head, places = 16 * (free.width + 1), 256 * free.width
    theirs = rows[f"dit-zero-{size}"]["parameters"] + head + places - (free.width + 1)
    assert f"{theirs / 1e6:.1f}" == f"{DIT[f'dit-{size}'][0]}"
    assert size != "xl" or theirs == 675_129_632  # which its code prints


def test_the_table_names_shapes(rows, monkeypatch):
    lines = []
    monkeypatch.setattr("builtins.print", lines.append)
    monkeypatch.setattr(models, "PUBLISHED", {name: PUBLISHED[name] for name in ("ddpmpp", "dit-s")})
    assert models.run(cli.parse(["models"])) == 0
    head, image, latent = lines[0].splitlines()
    assert head.split() == "name M parameters Gflop forward input classes".split()
    assert image.split() == ["ddpmpp", "55.7", "21.2", "3x32x32", "pixels", "-"]
    assert latent.split() == ["dit-s", "29.4", "6.0", "4x32x32", "latents", "1000"]
