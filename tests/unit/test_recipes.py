"""The recipes: all of them load, say what they compute, and build on each other; two of them live a shrunk life."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sctrain.commands import smoke
from sctrain.config.loading import load
from sctrain.config.recipes import recipe_names, recipe_of
from sctrain.errors import UserError
from sctrain.smoke.data import described
from sctrain.smoke.shrinking import BUDGET, shrunk

SICK = """
name: sick
run_dir: runs/sick
objective: {name: edm}
batch: {global_size: 8}
budget_images: 80
"""
ROOT = Path(__file__).parents[2]
RECIPES = recipe_names()
PAPERS = [name for name in RECIPES if not name.startswith("digits/")]
PRODUCT = re.compile(r"^\s*(\w+): ([\d_]+)  # ([\d,]+) iterations x ([\d,]+)")
# Every (method, data set) that a paper ran, by folder.
PAIRS = {
    "cifar10": {
        *("edm", "trigflow", "pd", "cd", "ct", "cd_continuous", "ct_continuous", "ict", "ect", "ctm"),
        *("sct", "scd", "sct_discrete", "scd_discrete"),
    },
    "imagenet64": {"edm", "trigflow", "pd", "cd", "ct", "ict", "ect", "ctm", "sct", "scd"},
    "lsun256": {"edm", "cd", "ct"},
    "imagenet512": {"trigflow", "sct", "scd", "lcm", "lcf"},
}


@pytest.mark.parametrize("folder", PAIRS)
def test_every_pair_that_a_paper_ran_has_a_recipe(folder: str):
    assert {load(name).objective.name for name in PAPERS if name.startswith(folder)} == PAIRS[folder]


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_names_its_source_and_its_figures(name: str):
    text = (ROOT / "configs" / name).read_text()
    header = text[: text.index("base:")]
    assert re.search(r"\((Karras|Lu|Song|Geng|Kim|Salimans|Luo)\b[^)]* 20\d\d", header)
    assert "paper" in header and re.search(r"measured (-|\d)", header)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_what_it_builds_on_is_a_recipe_too(name: str):
    config = load(name)
    for source in (config.teacher, config.start_from):
        if source is not None:
            other = recipe_of(source.run, name)
            assert other.noise_input == config.noise_input and other.sigma_data == config.sigma_data
            assert other.data == config.data
            theirs, ours = (
                {key: value for key, value in vars(run.network).items() if not key.startswith("dropout")}
                for run in (other, config)
            )
            assert theirs == ours
    if config.teacher is not None and config.objective.guided_scales is not None:
        assert recipe_of(config.teacher.run, name).objective.label_dropout > 0
    assert (config.teacher is not None) == (config.objective.distils)


def test_names_and_run_folders_are_their_own():
    configs = [load(name) for name in RECIPES]
    assert len({config.run_dir for config in configs}) == len({config.name for config in configs}) == len(RECIPES)


def test_images_are_iterations_times_the_batch():
    """The product written beside a count is that count, and its batch is the recipe's."""
    found = 0
    for name in PAPERS:
        text = (ROOT / "configs" / name).read_text()
        for line in filter(None, map(PRODUCT.match, text.splitlines())):
            count, iterations, batch = (int(re.sub("[_,]", "", part)) for part in line.groups()[1:])
            assert count == iterations * batch and batch == load(name).batch.global_size, f"{name}: {line[0]}"
            found += 1
    assert found > 50


def test_a_run_that_no_recipe_makes_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no recipe in .*cifar10 has run_dir .*runs/none"):
        recipe_of(tmp_path / "runs/none", "cifar10/scd.yaml")


def smoked(*recipes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sctrain", "smoke", *recipes]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)


def test_two_recipes_live_and_a_sick_one_is_one_sentence(tmp_path: Path):
    """From data alone in float32; distilled from a shrunk teacher in bf16; and heads that do not divide the width."""
    sick = tmp_path / "sick.yaml"
    base = (ROOT / "configs/cifar10/base.yaml").read_text()
    sick.write_text(base.replace("name: ddpmpp", "{name: dit, heads: 7}") + SICK)
    result = smoked("cifar10/ict.yaml", str(sick), "imagenet64/scd-s.yaml")
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stdout == ""
    lived = [line for line in result.stderr.splitlines() if line.startswith("[ok]")]
    assert len(lived) == 2 and all("resumed at 40 images, parameters moved, sampled" in line for line in lived)
    assert "56.4 M parameters" in lived[0]
    errors = [line for line in result.stderr.splitlines() if line.startswith("sctrain: error: ")]
    assert len(errors) == 1 and "building the full network" in errors[0] and "network.heads (7)" in errors[0]


def test_data_of_unknown_shape_are_named():
    config = load("cifar10/edm.yaml", ["data.url=data/elsewhere"])
    with pytest.raises(UserError, match="data/elsewhere is not here, and no known data set"):
        described(config)


def test_everything_that_counts_images_shrinks_in_proportion(tmp_path: Path):
    config = load("imagenet512/trigflow-s.yaml")
    small = shrunk(config, "images", tmp_path, {})
    assert small.budget_images == BUDGET and small.run_dir == tmp_path / config.run_dir
    assert small.optimizer.ramp_images == 1  # 10 of 2,146 Mimg, at least one image
    assert small.optimizer.reference_images == round(BUDGET * 70 / 1048)
    student = shrunk(load("imagenet512/sct-s.yaml"), "images", tmp_path, {})
    assert student.objective.tangent_warmup_images == BUDGET // 10
    assert student.network.dropout == 0.25 and student.network.channels == 16 and student.network.dropout_below == 16


@pytest.mark.full
def test_every_recipe_lives():
    result = smoked(*RECIPES)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("[ok] ") == len(RECIPES)


def test_all_recipes_are_the_default(monkeypatch: pytest.MonkeyPatch):
    started: list[str] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(smoke, "run_ranks", lambda argv, ranks, env: started.extend(argv) or 0)
    assert smoke.run(smoke.cli.parse(["smoke"])) == 0
    assert started[started.index("smoke") + 1 :] == RECIPES
