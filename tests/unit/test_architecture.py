"""The floors of docs/architecture.md: no import upwards, none in a circle, and no file that nobody can read at once."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400  # lines of a Python file

# The longest name that a module starts with decides. A new room needs a floor here.
FLOORS = {
    "models": 0,
    "data_pipeline": 0,
    "sctrain": 1,
    "sctrain.config": 1,
    "sctrain.errors": 1,
    "sctrain.files": 1,
    "sctrain.guidance": 1,
    "sctrain.latents": 1,
    "sctrain.vae": 1,
    "sctrain.augmentation": 1,
    "sctrain.blueprint": 1,
    "sctrain.power_ema": 1,
    "sctrain.provenance": 1,
    "sctrain.parameterization": 1,
    "sctrain.record": 1,
    "sctrain.solvers": 1,
    "sctrain.processes": 1,
    "sctrain.randomness": 1,
    "sctrain.reporting": 1,
    "sctrain.runs": 1,
    "sctrain.schedules": 1,
    "sctrain.sealed_folder": 1,
    "sctrain.signals": 1,
    "sctrain.tensor_file": 1,
    "sctrain.trials": 2,
    "sctrain.building": 2,
    "sctrain.sources": 2,
    "sctrain.imports": 2,
    "sctrain.editing": 2,
    "sctrain.exports": 2,
    "sctrain.guard": 2,
    "sctrain.monitor": 2,
    "sctrain.objectives": 2,
    "sctrain.sampling": 2,
    "sctrain.schedule_curves": 2,
    "sctrain.snapshots": 2,
    "sctrain.zero": 2,
    "sctrain.self_check": 2,
    "sctrain.beside": 3,
    "sctrain.parts": 3,
    "sctrain.run_state": 3,
    "sctrain.trainer": 3,
    "sctrain.checkup": 4,
    "sctrain.evaluation": 4,
    "sctrain.exporting": 4,
    "sctrain.planning": 4,
    "sctrain.bench": 4,
    "sctrain.smoke": 4,
    "sctrain.cli": 5,
    "sctrain.commands": 5,
    "sctrain.__main__": 5,
}
# Packages that keep to themselves: the only modules of the project that they import are their own.
ALONE = ("models", "data_pipeline", "launchers")
# What only some rooms may import.
RESERVED = {"deepspeed": ("sctrain.zero",), "launchers": ("launchers", "sctrain.cli", "sctrain.commands")}

Sources = dict[str, str]  # module name -> its text


def violations(sources: Sources) -> list[str]:
    """Every broken rule, as a sentence."""
    arrows = {module: set(_imports(text, sources)) for module, text in sources.items()}
    found = [
        f"{module} may not import {imported}"
        for module, targets in arrows.items()
        for imported in sorted(targets)
        if not _allowed(module, imported, sources)
    ]
    return found + [
        f"{module} has no floor" for module in sources if not _is_in(module, "launchers") and not _room(module)
    ]


def circle(sources: Sources) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    graph = {module: {name for name in _imports(text, sources) if name in sources} for module, text in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def _allowed(module: str, imported: str, sources: Sources) -> bool:
    for name, rooms in RESERVED.items():
        if _is_in(imported, name):
            return any(_is_in(module, room) for room in rooms)
    if imported not in sources:
        return True  # a third party
    for package in ALONE:
        if _is_in(module, package):
            return _is_in(imported, package)
    return FLOORS.get(_room(imported), 0) <= FLOORS.get(_room(module), 0)


def _room(module: str) -> str:
    """The entry of FLOORS that holds `module`; `sctrain` itself holds only its __init__."""
    rooms = [room for room in FLOORS if _is_in(module, room) and (room != "sctrain" or module == room)]
    return max(rooms, key=len, default="")


def _is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def _imports(text: str, sources: Sources) -> Iterator[str]:
    """Full names of what a module imports anywhere in its text, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide where an arrow points"
            members = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (member if member in sources else node.module for member in members)


def project() -> Sources:
    """All modules of the four packages."""
    files = (path for package in ("sctrain", *ALONE) for path in sorted((ROOT / package).rglob("*.py")))
    return {_module(path.relative_to(ROOT)): path.read_text() for path in files}


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_the_project_keeps_its_floors():
    assert len(project()) > 30
    assert violations(project()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(project()) == []


def test_no_file_is_too_long():
    skipped = {".venv", "build", "dist"}
    files = [path for path in ROOT.rglob("*.py") if not skipped & set(path.relative_to(ROOT).parts)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 30
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize(
    ("module", "text", "imported"),
    [
        ("sctrain.config.schema", "from sctrain.trainer import train", "sctrain.trainer"),
        ("sctrain.zero.engine", "def late():\n    import sctrain.evaluation.queue", "sctrain.evaluation.queue"),
        ("sctrain.errors", "from sctrain import trainer", "sctrain.trainer"),
        ("models.dit", "from sctrain.errors import UserError", "sctrain.errors"),
        ("models.dit", "import data_pipeline.loader", "data_pipeline.loader"),
        ("data_pipeline.loader", "import deepspeed", "deepspeed"),
        ("sctrain.trainer", "from deepspeed.utils import groups", "deepspeed.utils"),
        ("sctrain.trainer", "import launchers.local", "launchers.local"),
        ("launchers.local", "import sctrain.cli", "sctrain.cli"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, text: str, imported: str):
    innocent = ["sctrain.trainer", "sctrain.evaluation.queue", "sctrain.errors", "data_pipeline.loader", "sctrain.cli"]
    sources = dict.fromkeys(innocent, "import torch") | {module: text}
    assert violations(sources) == [f"{module} may not import {imported}"]


def test_a_room_without_a_floor_is_found():
    assert violations({"sctrain.cellar.wine": ""}) == ["sctrain.cellar.wine has no floor"]


def test_a_circle_is_found():
    sources = {"models.a": "import models.b", "models.b": "from models import c", "models.c": "from models.a import x"}
    assert set(circle(sources)) == {"models.a", "models.b", "models.c"}
