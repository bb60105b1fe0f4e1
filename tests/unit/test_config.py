"""The run description: how it is read, what is refused and in which words, and what DeepSpeed is told."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sctrain.config.checks import check
from sctrain.config.deepspeed import deepspeed_config, derive_batch
from sctrain.config.loading import difference, dump, load
from sctrain.config.recipes import recipe_names
from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import dump_yaml, read_document
from sctrain.errors import UserError

RECIPES = Path(__file__).parents[2] / "configs"
SMALLEST = """\
name: small
run_dir: runs/small
data: {url: data/digits}
network: {name: dit}
objective: {name: sct}
batch: {global_size: 256}
budget_images: 1Mi
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path / "small.yaml", SMALLEST)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_counts_have_binary_suffixes(recipe: Path):
    config = load(recipe, ["cadence.status=1.5Ki", "cadence.snapshot=1e3"])
    assert (config.budget_images, config.cadence.status, config.cadence.snapshot) == (2**20, 1536, 1000)


def test_overrides_are_yaml_and_the_last_wins(recipe: Path):
    config = load(
        recipe, ["optimizer.learning_rate=1e-4", "seed=3", "seed=4", "ema.widths=[0.1, 2e-1]", "teacher=null"]
    )
    assert (config.optimizer.learning_rate, config.seed, config.ema.widths, config.teacher) == (
        1e-4,
        4,
        (0.1, 0.2),
        None,
    )


@pytest.mark.parametrize("text", ["1e-4", "+1e4", "-2E3", "1.e-3", ".5e2", "1.5e3", "12_0e1", "1e+2", "3.25", "-.inf"])
def test_numbers_are_numbers_everywhere(tmp_path: Path, text: str):
    values = read_document(written(tmp_path / "a.yaml", f"deepspeed: {{deep: [{text}]}}\nquoted: '{text}'\n")).values
    number = values["deepspeed"]["deep"][0]
    assert isinstance(number, float) and number == float(text.replace(".inf", "inf"))
    assert values["quoted"] == text


@pytest.mark.parametrize("text", ["1e", "e4", "e-4", "1e4x", "v1.0e", "1.2.3e4", "_1e4", "0x1e4g"])
def test_words_stay_words(tmp_path: Path, text: str):
    assert read_document(written(tmp_path / "a.yaml", f"word: {text}")).values == {"word": text}


def test_dump_loads_back_to_the_same(recipe: Path, tmp_path: Path):
    config = load(recipe, ["name='1e-4'", "optimizer.learning_rate=1e-5", "deepspeed.comms_logger={enabled: true}"])
    assert load(written(tmp_path / "again.yaml", dump(config))) == config


def test_what_reads_like_a_number_is_quoted():
    assert yaml.safe_load(dump_yaml({"a": "1e4"})) == {"a": "1e4"}
    assert "'1e4'" in dump_yaml({"a": "1e4"})


def test_bases_merge_key_by_key_and_the_including_file_wins(tmp_path: Path):
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared" / "deepest.yaml", "optimizer: {learning_rate: 1e-2, eps: 1e-6, betas: [0.5, 0.6]}\n")
    written(tmp_path / "shared" / "first.yaml", SMALLEST + "base: deepest.yaml\noptimizer: {learning_rate: 2e-2}\n")
    written(tmp_path / "second.yaml", "seed: 5\noptimizer: {betas: [0.7, 0.8]}\n")
    top = written(tmp_path / "top.yaml", "base: [shared/first.yaml, second.yaml]\nseed: 6\n")
    config = load(top)
    assert config.optimizer.model_dump(include={"learning_rate", "eps", "betas"}) == {
        "learning_rate": 2e-2,
        "eps": 1e-6,
        "betas": (0.7, 0.8),
    }
    assert (config.seed, config.name) == (6, "small")


def test_a_mistake_is_placed_in_the_base_that_made_it(tmp_path: Path):
    base = written(tmp_path / "base.yaml", SMALLEST + "seed: often\n")
    top = written(tmp_path / "top.yaml", "base: base.yaml\nname: top\n")
    assert complaint(top) == f"{base}:8: 'seed' must be a valid integer, not \"often\""


def test_bases_in_a_circle_are_refused(tmp_path: Path):
    written(tmp_path / "a.yaml", "base: b.yaml\n")
    written(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "`base:` runs in a circle: a.yaml -> b.yaml -> a.yaml" in complaint(tmp_path / "a.yaml")


def test_recipes_of_the_project_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    top = written(tmp_path / "top.yaml", SMALLEST + "base: digits/base.yaml\n")
    shared = read_document(RECIPES / "digits" / "base.yaml").values
    assert list(load(top).data.std) == shared["data"]["std"] and load(top).network.depth == shared["network"]["depth"]


def test_all_recipes_of_the_project_are_sound():
    recipes = recipe_names()
    assert len(recipes) > 70
    for recipe in recipes:
        load(recipe)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sede: 1", "8: unknown key 'sede'; the nearest valid one is 'seed'"),
        ("learning_rate: 1", "8: unknown key 'learning_rate'; the nearest valid one is 'optimizer.learning_rate'"),
        ("optimizer:\n  lr: 1", "9: unknown key 'optimizer.lr'; the nearest valid one is 'optimizer.learning_rate'"),
        ("evaluation: {stesp: [1]}", "8: unknown key 'evaluation.stesp'; the nearest valid one is 'evaluation.steps'"),
        ("seed: 1.5", "8: 'seed' must be a valid integer, not 1.5"),
        ("sigma_data: -1", "8: 'sigma_data' must be greater than 0, not -1"),
        ("sigma_data: .nan", "8: 'sigma_data' must be a finite number, not NaN"),
        ("precision: fp8", "8: 'precision' must be 'fp32' or 'bf16', not \"fp8\""),
        ("optimizer: {betas: [1e-1]}", "8: the key 'optimizer.betas.1' is missing"),
        ("optimizer: 3", "8: 'optimizer' must be a mapping of keys to values, not 3"),
        (
            "cadence: {status: 8x}",
            "8: 'cadence.status': '8x' is not a count of images; write for example 4096, 64Ki or 8Mi",
        ),
        ("teacher: {run: 3, ema: 0.1}", "8: 'teacher.run' must be a path, not 3"),
        ("teacher: {ema: 0.1}", "8: the key 'teacher.run' is missing"),
        ("seed: 1\nseed: 2", "9: the key 'seed' appears twice; keep one of the two"),
        ("1: 2", "8: the key '1' is not text; put it in quotes"),
        ("seed: &a 1\nname: *a", "9: YAML aliases are not read; use `base:` instead"),
        ("seed: [1", "9: this is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("base: 3", "8: 'base' must be a file name or a list of file names"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(recipe: Path, line: str, sentence: str):
    recipe.write_text(f"{SMALLEST}{line}\n")
    assert complaint(recipe) == f"{recipe}:{sentence}"


def test_mistakes_inside_a_union_are_named_without_its_tag(recipe: Path):
    assert complaint(recipe, "objective.time.mean=0") == (
        "override 'objective.time.mean=0': unknown key 'objective.time'; the nearest valid one is 'objective.times'"
    )
    assert "'objective.times.std' must be greater than 0" in complaint(recipe, "objective.times.std=0")
    assert "'objective.name' must be one of 'trigflow', 'edm', 'pd', 'cd', 'ct', " in complaint(
        recipe, "objective.name=sctt"
    )
    assert "the key 'objective.name' is missing" in complaint(recipe, "objective=null", "objective={}")


TEACHER = "teacher={run: runs/t, ema: 0.1}"


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ("{name: sct_discrete, segments: 2}", "'objective.segments' is no key of this objective"),
        ("{name: cd, augmentation: 0.1}", "'objective.augmentation' is no key of this objective"),
        ("{name: edm, augmentation: 1.5}", "'objective.augmentation' must be less than or equal to 1, not 1.5"),
        ("{name: cd, metric: {name: lpips}}", "'objective.metric': lpips needs 'weights', the file of torchvision's"),
        ("{name: cd, metric: {weights: a.pth}}", "'objective.metric': 'weights' are for lpips, l2 has none"),
        ("{name: cd, metric: {name: l1, constant: 1}}", "'objective.metric': 'constant' is for pseudo_huber and huber"),
        ("{name: cd, metric: l2}", "'objective.metric' must be a mapping of keys to values, not \"l2\""),
        ("{name: cd, target_decay: 1}", "'objective.target_decay' must be less than 1, not 1"),
        ("{name: lcm, target_decay: -0.1}", "'objective.target_decay' must be greater than or equal to 0, not -0.1"),
        ("{name: ct, first_decay: 1.5}", "'objective.first_decay' must be less than 1, not 1.5"),
        ("{name: pd, first_steps: 12, last_steps: 5}", "first_steps 12 does not halve down to last_steps 5; let it be"),
        ("{name: pd, first_steps: 2, last_steps: 4}", "first_steps 2 does not halve down to last_steps 4; let it be"),
        ("{name: lcm, ddim_steps: 2000}", "'objective.ddim_steps' must be less than or equal to 1000, not 2000"),
        ("{name: scd, guidance: {low: 3, high: 1}}", "'objective.guidance': low 3.0 exceeds high 1.0; exchange them"),
        ("{name: scd, segments: 0}", "'objective.segments' must be greater than or equal to 1, not 0"),
        *[
            (f"{{name: {name}, sigma_min: {low}, sigma_max: 1}}", sentence)
            for name in ("cd", "ct", "ict", "ct_continuous", "cd_continuous", "sct_discrete", "scd_discrete")
            for low, sentence in (
                (2, "'objective': sigma_min 2.0 is not below sigma_max 1.0; exchange them"),
                (1, "'objective': sigma_min and sigma_max are both 1.0; the second must be greater"),
            )
        ],
    ],
)
def test_settings_that_no_method_has_are_refused(recipe: Path, objective: str, sentence: str):
    said = complaint(recipe, f"objective={objective}", TEACHER)
    assert sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["pd", "cd", "cd_continuous", "scd", "scd_discrete", "ctm", "lcm"])
def test_a_distillation_needs_a_teacher(recipe: Path, name: str):
    sentence = complaint(recipe, f"objective={{name: {name}}}")
    assert f"the objective '{name}' distils a teacher; name one with 'teacher.run' and 'teacher.ema'" in sentence


@pytest.mark.parametrize("name", ["edm", "ct", "ct_continuous", "ict", "ect", "sct_discrete", "lcf"])
def test_a_method_from_data_alone_has_no_teacher(recipe: Path, name: str):
    said = complaint(recipe, f"objective={{name: {name}}}", TEACHER, "start_from={run: runs/lcm, ema: 0.1}")
    assert f"the objective '{name}' has no teacher; remove 'teacher'" in said


def test_network_options_are_checked_like_the_rest(recipe: Path):
    assert "unknown key 'network.widht'; the nearest valid one is 'network.width'" in complaint(
        recipe, "network.widht=3"
    )


def test_every_mistake_is_named(recipe: Path):
    lines = complaint(recipe, "seed=x", "sede=1", "batch.global_size=0").splitlines()
    assert [line.split("'")[1] for line in lines] == ["seed=x", "batch.global_size=0", "sede=1"]


@pytest.mark.parametrize("override", ["seed", "=3", "optimizer..eps=1", ".seed=1"])
def test_an_override_that_is_none_is_refused(recipe: Path, override: str):
    assert complaint(recipe, override).endswith(
        "write it as section.key=value, for example optimizer.learning_rate=1e-4"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must hold a mapping of keys to values"),
        (b"- a", "must hold a mapping of keys to values"),
        (b"\xff\xfe\x00", "cannot be read: it is not UTF-8 text"),
        (b"a: \x00", "this is not valid YAML"),
        (b"a: !!python/object:os.system {}", "this is not valid YAML"),
    ],
)
def test_a_file_that_is_no_description_is_named(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    assert str(path) in complaint(path) and reason in complaint(path)


def test_a_missing_file_is_named(tmp_path: Path):
    assert complaint(tmp_path / "none.yaml").startswith(f"{tmp_path}/none.yaml: there is no file")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["objective.name=scd"],
            "the objective 'scd' distils a teacher; name one with 'teacher.run' and 'teacher.ema'",
        ),
        (["teacher={run: runs/t, ema: 0.1}"], "the objective 'sct' has no teacher; remove 'teacher'"),
        (["objective.name=trigflow", "teacher={run: runs/t, ema: 0.1}"], "the objective 'trigflow' has no teacher"),
        (["objective={name: lcf}"], "the objective 'lcf' fine-tunes an LCM; name it with 'start_from.run'"),
        (
            ["objective={name: pd}", TEACHER, "start_from={run: runs/s, ema: 0.1}"],
            "the objective 'pd' starts from its teacher and learns from what it started from, so 'start_from' would",
        ),
        (["objective.segments=2"], "'objective.segments' are for scd"),
        (["compute.compile=true"], "'compute.compile' cannot follow weights that ZeRO-3 gathers"),
        (["objective.guidance={high: 2}"], "the objective 'sct' has no teacher to guide"),
        (["objective.vsd={}"], "'objective.vsd' compares the student with a teacher"),
        (["guide={run: runs/g, ema: 0.1}"], "'guide' guides a teacher"),
        (["budget_images=0"], "'budget_images' is 0"),
        (["cadence.status=0"], "'cadence.status' is 0"),
        (["cadence.snapshot=0"], "'cadence.snapshot' is 0"),
        (["cadence.checkpoint=0"], "'cadence.checkpoint' is 0"),
        (
            ["objective.tangent_warmup_images=2Mi"],
            "'objective.tangent_warmup_images' (2097152) exceeds 'budget_images'",
        ),
        (["deepspeed.train_batch_size=8"], "'deepspeed.train_batch_size' is decided by 'batch.global_size'"),
        (["deepspeed.train_micro_batch_size_per_gpu=8"], "is decided by 'batch.micro_limit'"),
        (["deepspeed.gradient_accumulation_steps=8"], "is decided by 'batch.micro_limit'"),
        (["deepspeed.gradient_clipping=1.0"], "is decided by 'optimizer.gradient_clip'"),
        (["deepspeed.optimizer.type=Adam"], "'deepspeed.optimizer' is decided by 'optimizer'"),
        (["deepspeed.scheduler.type=WarmupLR"], "'deepspeed.scheduler' is decided by 'optimizer.ramp_images'"),
        (["deepspeed.bf16.enabled=false"], "'deepspeed.bf16.enabled' is decided by 'precision'"),
        (["deepspeed.zero_optimization.stage=2"], "'deepspeed.zero_optimization.stage' must be 3 or 0"),
        (
            ["precision=bf16", "compute.tangent_engine=finite_difference"],
            "bf16 rounds to noise; set 'precision' to fp32",
        ),
    ],
)
def test_contradictions_are_refused_with_the_file(recipe: Path, overrides: list[str], sentence: str):
    assert complaint(recipe, *overrides).startswith(f"{recipe}: ")
    assert sentence in complaint(recipe, *overrides)


FULL = ("objective.name=cd_continuous", "objective.form=full", "teacher={run: runs/t, ema: 0.1}")
REPLICATED = "deepspeed.zero_optimization.stage=0"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["objective.name=ct_continuous", "objective.form=full"], "'objective.form' full is for cd_continuous"),
        (FULL, "the tangent, whose parameters ZeRO-3 has freed by then: set 'deepspeed.zero_optimization.stage' to 0"),
        ([*FULL, REPLICATED, "precision=bf16"], "full needs 'precision' fp32"),
        ([*FULL, REPLICATED, "compute.checkpointing=true"], "full needs 'compute.checkpointing' false"),
        ([*FULL, REPLICATED, "compute.compile=true"], "full needs 'compute.compile' false"),
        (
            ["objective.name=ct_continuous", "objective.metric.name=l1"],
            "'objective.metric' is no key of this objective",
        ),
        (["objective.segments=2"], "'objective.segments' are for scd"),
        (["objective.name=scd_discrete"], "the objective 'scd_discrete' distils a teacher"),
        (["objective.name=sct_discrete", "objective.guidance={high: 2}"], "'sct_discrete' has no teacher to guide"),
    ],
)
def test_contradictions_of_the_continuous_family_are_refused(recipe: Path, overrides: list[str], sentence: str):
    assert sentence in complaint(recipe, *overrides)


def test_a_loss_through_its_tangents_passes_where_parameters_stay(recipe: Path):
    config = load(recipe, [*FULL, REPLICATED])
    check(config)
    assert config.objective.records_tangents and config.objective.has_tangents


def test_a_sound_distillation_passes(recipe: Path):
    check(load(recipe, ["objective.name=scd", "teacher={run: runs/t, ema: 0.1}"]))


def test_difference_names_what_a_resume_changes(recipe: Path):
    old = yaml.safe_load(dump(load(recipe))) | {"gone": {"for": "good"}}
    assert difference(old, load(recipe, ["optimizer.eps=1e-6", "deepspeed.a.b=1"])) == [
        "optimizer.eps: 1e-08 -> 1e-06",
        "deepspeed.a.b: (absent) -> 1",
        "deepspeed: {} -> (absent)",
        "gone.for: 'good' -> (absent)",
    ]
    assert difference(yaml.safe_load(dump(load(recipe))), load(recipe)) == []


@pytest.mark.parametrize(
    ("size", "limit", "world", "expected"),
    [
        (256, 256, 1, (256, 1)),
        (256, 48, 2, (32, 4)),
        (256, 128, 2, (128, 1)),
        (256, 1, 4, (1, 64)),
        (6, 2, 1, (2, 3)),
        (7, 3, 1, (1, 7)),
        (8, 2**31, 8, (1, 1)),
    ],
)
def test_the_batch_is_split_into_the_fewest_micro_batches(
    recipe: Path, size: int, limit: int, world: int, expected: tuple[int, int]
):
    config = with_batch(recipe, size, limit)
    micro, accumulation = derive_batch(config, world)
    assert (micro, accumulation) == expected
    assert micro * accumulation * world == size and micro <= limit


@pytest.mark.parametrize(("size", "nearest"), [(250, "249 and 252"), (2, "3")])
def test_an_impossible_split_names_both_numbers_and_what_works(recipe: Path, size: int, nearest: str):
    with pytest.raises(UserError, match=f"batch.global_size = {size} does not divide among 3 ranks.*: {nearest}$"):
        derive_batch(with_batch(recipe, size, 64), 3)


def with_batch(recipe: Path, size: int, limit: int) -> RunConfig:
    return load(recipe, [f"batch.global_size={size}", f"batch.micro_limit={limit}"])


def told(recipe: Path, *overrides: str) -> dict[str, Any]:
    return deepspeed_config(load(recipe, overrides), 2)


def test_deepspeed_is_told_what_the_description_decides(recipe: Path):
    given = told(recipe, "batch.micro_limit=48", "optimizer.gradient_clip=0.5", "precision=bf16")
    assert (given["train_batch_size"], given["train_micro_batch_size_per_gpu"]) == (256, 32)
    assert (given["gradient_accumulation_steps"], given["gradient_clipping"]) == (4, 0.5)
    assert given["bf16"] == {"enabled": True} and told(recipe)["bf16"] == {"enabled": False}
    assert given["zero_optimization"]["stage"] == 3
    assert given["zero_optimization"]["memory_efficient_linear"] is False


def test_the_passed_through_mapping_adds_to_ours_and_is_not_changed(recipe: Path):
    given = told(recipe, "deepspeed.zero_optimization.overlap_comm=false", "deepspeed.comms_logger={enabled: true}")
    assert given["zero_optimization"]["overlap_comm"] is False and given["zero_optimization"]["stage"] == 3
    assert given["comms_logger"] == {"enabled": True}
    assert math.isclose(told(recipe, "deepspeed.x.y=1e-4")["x"]["y"], 1e-4)
