"""The command line: parsing, exit codes, who speaks, and how fast it answers."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import sctrain
from data_pipeline.errors import DataError
from sctrain import cli
from sctrain.commands import doctor, train
from sctrain.errors import UserError

ROOT = Path(__file__).parents[2]
SMALLEST = """\
name: small
run_dir: runs/small
data: {url: data/digits}
network: {name: dit}
objective: {name: sct}
batch: {global_size: 256}
budget_images: 1Mi
"""


@pytest.fixture(autouse=True)
def outside_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "small.yaml").write_text(SMALLEST)
    return tmp_path


def sctrain_process(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sctrain", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_help_needs_no_heavy_import():
    program = "import sys, sctrain.cli; sctrain.cli.parse(['train', 'a']); print(*sorted(sys.modules))"
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert "sctrain.cli" in loaded
    assert not {"torch", "deepspeed", "numpy", "pydantic"} & set(loaded)


def test_global_flags_stand_before_and_after_the_command():
    for words in (["--debug", "--local_rank=3", "train", "a"], ["train", "a", "--local_rank=3", "--debug"]):
        args = cli.parse(words)
        assert (args.debug, args.local_rank, args.config) == (True, 3, "a")
    assert cli.parse(["train", "a"]).debug is False


def test_overrides_stand_anywhere_after_the_config():
    args = cli.parse(["train", "a", "seed=1", "--ranks", "2", "seed=2", "--debug"])
    assert (args.overrides, args.ranks) == (["seed=1", "seed=2"], 2)
    assert cli.parse(["train", "a", "optimizer.eps=-1e-4"]).overrides == ["optimizer.eps=-1e-4"]


def test_the_arguments_of_every_command():
    assert cli.parse(["prepare", "digits", "d"]).source == "digits"
    folder = cli.parse(["prepare", "folder", "s", "d", "--resolution", "64"])
    assert (folder.src, folder.dest, folder.resolution) == (Path("s"), "d", 64)
    assert cli.parse(["evaluate", "r", "--watch"]).watch is True
    sample = cli.parse(["sample", "r", "--class", "3", "--steps", "2", "--ema", "0.1", "--seed", "4", "--count", "5"])
    assert (sample.label, sample.steps, sample.ema, sample.seed, sample.count) == (3, 2, 0.1, 4, 5)
    assert cli.parse(["report", "scd=r", "--out", "o"]).runs == ["scd=r"]
    assert cli.parse(["quickstart", "budget_images=1Ki"]).overrides == ["budget_images=1Ki"]
    assert cli.parse(["doctor"]).config is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: COMMAND; see `sctrain --help`"),
        (["train"], "the following arguments are required: config; see `sctrain train --help`"),
        (["train", "a", "--rnks"], "unknown argument '--rnks'; `sctrain train --help` lists the known ones"),
        (["evaluate", "r", "more"], "unknown argument 'more'; `sctrain evaluate --help` lists the known ones"),
        (["evaluate", "r", "--once", "--watch"], "argument --watch: not allowed with argument --once"),
        (["train", "a", "--ranks", "two"], "argument --ranks: invalid int value: 'two'"),
        (["report", "runs/a"], "'runs/a' does not name a run; write it as name=RUN, for example teacher=runs/teacher"),
        (["train", "none.yaml"], "none.yaml: there is no file 'none.yaml'"),
        (["train", "small.yaml", "--ranks", "3"], "batch.global_size = 256 does not divide among 3 ranks"),
        (["train", "small.yaml", "--ranks", "0"], "override 'runtime.ranks=0': 'runtime.ranks' must be greater than"),
        (["train", "small.yaml"], "data/digits/dataset.json does not exist"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sctrain: error: ") and err.count("\n") == 1
    assert sentence in err


def test_mistakes_keep_their_traceback_with_debug():
    with pytest.raises(UserError):
        cli.main(["train", "none.yaml", "--debug"])


@pytest.mark.parametrize(
    ("error", "rank", "said"),
    [
        (UserError("a"), "0", "sctrain: error: a\n"),
        (UserError("a"), "1", ""),
        (UserError("a\nb"), None, "sctrain: error: a\nsctrain: error: b\n"),
        (DataError("shard"), "1", "sctrain (rank 1): error: shard\n"),
    ],
)
def test_one_rank_speaks_for_all_except_about_what_it_read(
    error: Exception,
    rank: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(_: object) -> int:
        raise error

    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == said


PRINTING = """
import sys, types
from sctrain import cli

def run(args):
    print("x" * int(sys.argv[1]), flush=len(sys.argv) > 2)
    return 0

sys.modules["sctrain.commands.smoke"] = types.SimpleNamespace(run=run)
sys.exit(cli.main(["smoke"]))
"""


@pytest.mark.parametrize("how", [["10"], ["10", "flush"], ["1000000"]])
@pytest.mark.parametrize("errors_too", [False, True])
def test_a_reader_that_ends_is_no_error(how: list[str], errors_too: bool):
    """As of `sctrain ... | head`: not a word, neither of another rank nor of an ignored exception."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", PRINTING, *how]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    stderr = writing if errors_too else subprocess.PIPE
    ended = subprocess.run(command, env=env, stdout=writing, stderr=stderr, timeout=60, check=False)
    os.close(writing)
    assert ended.returncode == cli.UNREAD and not ended.stderr


def test_a_lost_peer_is_still_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")  # of a connection; our output is read

    monkeypatch.setattr("sctrain.commands.train.run", broken)
    assert cli.main(["train", "small.yaml"]) == 1
    assert capsys.readouterr().err == "sctrain: error: another rank ended; its own message says why\n"


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_print_config_prints_yaml_that_trains_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "small.yaml", "--print-config", "--ranks", "2", "optimizer.learning_rate=1e-4"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "learning_rate: 0.0001" in out and "ranks: 2" in out
    (tmp_path / "again.yaml").write_text(out)
    assert cli.main(["train", "again.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == out


def test_train_starts_the_planned_ranks_with_the_same_arguments(monkeypatch: pytest.MonkeyPatch):
    """Only the start is replaced; tests/unit/test_launchers.py runs it."""
    started = []
    monkeypatch.setattr(train, "open_split", lambda config: None)
    monkeypatch.setattr(train, "run_ranks", lambda argv, ranks, env: started.append((argv[1:], ranks)) or 75)
    assert cli.main(["--debug", "train", "small.yaml", "seed=1", "--ranks", "4"]) == 75
    assert cli.main(["train", "small.yaml"]) == 75
    assert started == [
        (["-m", "sctrain", "--debug", "train", "small.yaml", "seed=1", "runtime.ranks=4"], 4),
        (["-m", "sctrain", "train", "small.yaml"], 2),
    ]


def test_train_stays_in_this_process_where_it_has_a_rank(monkeypatch: pytest.MonkeyPatch):
    trained = []
    trainer = SimpleNamespace(train=lambda config: trained.append((config.name, os.environ["RANK"])) or 0)
    monkeypatch.setitem(sys.modules, "sctrain.trainer", trainer)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "small.yaml"]) == 0
    assert trained == [("small", "1")]


def test_doctor_is_content_with_this_machine(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[ok] ") for line in lines)
    for subject in (
        "Python 3",
        "torch ",
        "deepspeed ",
        f"package models from {ROOT}",
        "C++ compiler",
        "Python headers",
    ):
        assert any(subject in line for line in lines), subject


def test_doctor_names_what_is_wrong_with_a_run(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "small.yaml", "batch.global_size=3", "runtime.ranks=2"]) == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[!!] ")]
    assert len(wrong) == 2
    assert "dataset.json" in wrong[0]
    assert "batch.global_size = 3 does not divide among 2 ranks" in wrong[1]


def test_doctor_reports_a_wrong_description_as_a_finding(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "small.yaml", "sede=1"]) == 2
    assert "[!!] run description: override 'sede=1': unknown key 'sede'" in capsys.readouterr().out


def test_doctor_misses_a_compiler_headers_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert cli.main(["doctor"]) == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[!!] ")]
    assert len(wrong) == 3
    assert wrong[0] == "[!!] no C++ compiler 'no-such-compiler': install one (Debian: `apt install g++`)"
    assert wrong[1].endswith("missing; install them (Debian: `apt install python3-dev`)")
    assert wrong[2].endswith("cannot be written; set TORCH_EXTENSIONS_DIR to a folder of your own")


def test_the_version_is_that_of_the_package():
    assert sctrain.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert sctrain_process("--version").stdout.strip() == sctrain.__version__


def test_a_foreign_package_of_the_same_name_is_named(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    process = sctrain_process("--help", cwd=tmp_path)  # python -m looks in the current folder first
    assert process.returncode == 1
    assert (
        f"ImportError: sctrain needs its own package 'models' in {ROOT}, but Python finds {tmp_path}" in process.stderr
    )
