"""YAML as this project reads and writes it: safe, `1e-4` is a number everywhere, every key knows its line.

Keys must be text and appear once; aliases are refused, because `base:` and merging say the same in plainer words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sctrain.errors import UserError

Key = tuple[str, ...]

_FLOAT_TAG = "tag:yaml.org,2002:float"
_TEXT_TAG = "tag:yaml.org,2002:str"
# What YAML 1.1 leaves out: a mantissa without a dot, an exponent without a sign.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


@dataclass(frozen=True)
class Document:
    """A mapping and the place ("file:line") of each of its keys; the place of () is the whole file."""

    values: dict[str, Any]
    places: dict[Key, str]

    def place(self, key: Key) -> str:
        """Where `key`, or else something in it, or else the nearest key around it was written."""
        prefixes = (key[:end] for end in range(len(key), -1, -1))
        written = self.places.items()
        return next(place for prefix in prefixes for other, place in written if other[: len(prefix)] == prefix)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise UserError(f"{_place(self.peek_event().start_mark)}: YAML aliases are not read; use `base:` instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != _TEXT_TAG:
                raise UserError(f"{_place(key.start_mark)}: the key '{key.value}' is not text; put it in quotes")
            if key.value in seen:
                raise UserError(f"{_place(key.start_mark)}: the key '{key.value}' appears twice; keep one of the two")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Short lists stay on one line; text that reads like a number is quoted."""


_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def read_document(path: Path) -> Document:
    """The mapping in a file. UserError if it is unreadable, not YAML, or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from error
    values, node = _parse(text, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: must hold a mapping of keys to values")
    return Document(values, {(): str(path), **dict(_places(node, ()))})


def parse_value(text: str, source: str) -> Any:
    """One value in YAML's notation; `source` names it in errors."""
    return _parse(text, source)[0]


def dump_yaml(values: dict[str, Any]) -> str:
    """Text that `read_document` turns back into the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`: mappings key by key, everything else replaced. Neither is changed."""
    result = dict(lower)
    for name, value in upper.items():
        below = result.get(name)
        result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _parse(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    try:
        loader = _Loader(text)
        loader.name = source
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.MarkedYAMLError as error:
        place = source if error.problem_mark is None else _place(error.problem_mark)
        raise UserError(f"{place}: this is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: this is not valid YAML: {' '.join(str(error).split())}") from error


def _places(node: yaml.MappingNode, prefix: Key) -> Iterator[tuple[Key, str]]:
    for key, value in node.value:
        yield (*prefix, key.value), _place(key.start_mark)
        if isinstance(value, yaml.MappingNode):
            yield from _places(value, (*prefix, key.value))


def _place(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}"
