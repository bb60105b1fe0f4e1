"""From YAML files and command-line overrides to one checked `RunConfig`, and back.

`base:` names one file or a list of files that are read first; the file that names them wins. Mappings merge key by key,
everything else is replaced. Relative paths inside the description (`run_dir`, `data.url`, `teacher.run`) start from the
current working directory, those in `base:` from the file that names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sctrain.config.checks import check
from sctrain.config.mistakes import sentences
from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import Document, Key, dump_yaml, merged, parse_value, read_document
from sctrain.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
RECIPE_FOLDERS = (_ROOT / "configs", _ROOT / "sctrain" / "_configs")  # in a checkout; in an installed wheel


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The description in `path`, its bases below it and `section.key=value` overrides on top.

    A name that does not exist here is looked up among the recipes that come with the project. UserError names the file,
    the line and the key of every mistake.
    """
    file = locate(Path(path), Path(), str(path))
    document = _read(file, ())
    for override in overrides:
        document = _merge(document, _parse_override(override))
    try:
        config = RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise UserError("\n".join(sentences(error, document))) from error
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config


def dump(config: RunConfig) -> str:
    """The whole description as YAML that loads back to the same."""
    return dump_yaml(config.model_dump(mode="json"))


def difference(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """`key: old -> new` for every key in which a saved description (as read from YAML) and `new` differ."""
    before, after = dict(_leaves(old, ())), dict(_leaves(new.model_dump(mode="json"), ()))
    keys = [*after, *(key for key in before if key not in after)]
    changed = (key for key in keys if before.get(key, _Absent) != after.get(key, _Absent))
    return [f"{'.'.join(key)}: {_shown(before, key)} -> {_shown(after, key)}" for key in changed]


class _Absent:
    """Equal to no value of a description."""


def _shown(leaves: dict[Key, Any], key: Key) -> str:
    return repr(leaves[key]) if key in leaves else "(absent)"


def _leaves(values: Mapping[str, Any], prefix: Key) -> Iterator[tuple[Key, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _read(path: Path, including: tuple[Path, ...]) -> Document:
    """One file on top of its bases. `including` are the files on the way here."""
    chain = (*including, path.resolve())
    if chain[-1] in including:
        circle = " -> ".join(file.name for file in chain)
        raise UserError(f"{path}: `base:` runs in a circle: {circle}; remove one link")
    own = read_document(path)
    document = Document({}, {})
    for name in _bases(own):
        document = _merge(document, _read(locate(Path(name), path.parent, own.place(("base",))), chain))
    return _merge(document, own)


def _bases(document: Document) -> list[str]:
    names = document.values.pop("base", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{document.place(('base',))}: 'base' must be a file name or a list of file names")
    return names


def locate(name: Path, folder: Path, wanted_by: str) -> Path:
    """The file `name` in `folder`, else among the recipes that come with the project; UserError if there is none."""
    candidates = [folder / name, *(recipes / name for recipes in RECIPE_FOLDERS)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{wanted_by}: there is no file '{name}' in {folder.absolute()} nor in {RECIPE_FOLDERS[0]}")


def _parse_override(override: str) -> Document:
    dotted, equals, text = override.partition("=")
    place = f"override '{override}'"
    key = tuple(dotted.split("."))
    if not equals or not all(key):
        raise UserError(f"{place}: write it as section.key=value, for example optimizer.learning_rate=1e-4")
    value = parse_value(text, place)
    for name in reversed(key):
        value = {name: value}
    return Document(value, {key: place})


def _merge(lower: Document, upper: Document) -> Document:
    return Document(merged(lower.values, upper.values), {**lower.places, **upper.places})
