"""Neighbours on a fine grid are not compared in bf16; on a coarse one, and with tangents, it will do."""

import pytest

from sctrain.config.loading import load
from sctrain.errors import UserError

BF16 = "precision=bf16"


@pytest.mark.parametrize(
    ("recipe", "override", "levels"),
    [
        ("cifar10/ct.yaml", None, 150),
        ("cifar10/ict.yaml", None, 1280),
        ("cifar10/ect.yaml", None, 256),
        ("cifar10/sct_discrete.yaml", None, 1024),
        ("cifar10/scd_discrete.yaml", None, 1024),
        ("imagenet64/cd.yaml", "objective.levels=80", 80),
        ("imagenet512/lcm.yaml", "objective.ddim_steps=100", 100),
    ],
)
def test_a_fine_grid_is_refused(recipe: str, override: str | None, levels: int):
    overrides = [] if override is None else [override]
    load(recipe, [*overrides, "precision=fp32"])
    with pytest.raises(UserError) as refusal:
        load(recipe, [*overrides, BF16])
    said = f"among {levels} noise levels, whose difference bf16 rounds away; set 'precision' to fp32"
    assert said in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "recipe",
    [
        *("imagenet64/cd.yaml", "imagenet64/ctm.yaml", "imagenet512/lcm.yaml", "imagenet512/lcf.yaml"),
        *("cifar10/sct.yaml", "cifar10/scd.yaml", "cifar10/pd.yaml"),
    ],
)
def test_coarse_grids_and_tangents_are_not(recipe: str):
    assert load(recipe, [BF16]).precision == "bf16"
