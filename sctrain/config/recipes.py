"""The recipes that come with the project, and which of them makes a run that another one builds on."""

from __future__ import annotations

from pathlib import Path

from sctrain.config.loading import RECIPE_FOLDERS, load, locate
from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import read_document
from sctrain.errors import UserError
from sctrain.runs import RunFolder


def recipe_names() -> list[str]:
    """All recipes of the project, as `sctrain train` takes them, sorted."""
    root = next(folder for folder in RECIPE_FOLDERS if folder.is_dir())
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml") if _own_run_dir(path))


def recipe_of(run_dir: Path, wanted_by: str) -> RunConfig:
    """The description of the run in `run_dir`: of a recipe in the folder of `wanted_by`, else that of the run itself.

    UserError if neither is there.
    """
    folder = locate(Path(wanted_by), Path(), wanted_by).parent
    for path in sorted(folder.glob("*.yaml")):
        if _own_run_dir(path) == run_dir:
            return load(path)
    saved = RunFolder(run_dir).config
    if not saved.is_file():
        raise UserError(
            f"{wanted_by}: no recipe in {folder} has run_dir {run_dir}, and there is no such run; write one"
        )
    return load(saved)


def _own_run_dir(path: Path) -> Path | None:
    """The run folder that this very file names; None for those that only hold what recipes share."""
    named = read_document(path).values.get("run_dir")
    return Path(named) if isinstance(named, str) else None
