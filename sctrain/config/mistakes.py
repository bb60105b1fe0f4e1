"""What is wrong with a description, said in one sentence per mistake: the place, the key, what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models.registry import UNNAMED
from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import Document, Key

_MAPPING_EXPECTED = ("model_type", "dataclass_type", "model_attributes_type")


def sentences(error: ValidationError, document: Document) -> list[str]:
    """One sentence for each mistake that validation found in `document`."""
    return [_sentence(item, document) for item in error.errors(include_url=False)]


def _sentence(item: ErrorDetails, document: Document) -> str:
    key = _key(item["loc"], document.values)
    return f"{document.place(key)}: {_complaint(item, '.'.join(key), key)}"


def _complaint(item: ErrorDetails, name: str, key: Key) -> str:
    given, context = json.dumps(item["input"], default=str)[:80], item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            if key in _valid_keys():  # of another member of the union
                return f"'{name}' is no key of this {key[-2]}; remove it, or choose another '{'.'.join(key[:-1])}.name'"
            return f"unknown key '{name}'; the nearest valid one is '{'.'.join(nearest(key))}'"
        case "missing":
            return f"the key '{name}' is missing"
        case "union_tag_not_found":
            return f"the key '{name}.name' is missing"
        case "union_tag_invalid":
            return f"'{name}.name' must be one of {context['expected_tags']}, not '{context['tag']}'"
        case "value_error":
            return f"'{name}': {context['error']}"
        case kind if kind in _MAPPING_EXPECTED:
            return f"'{name}' must be a mapping of keys to values, not {given}"
        case "path_type":
            return f"'{name}' must be a path, not {given}"
    # What pydantic says: "Input should be <what>, <why not>" or "Tuple should have <what> after validation, not <what>"
    expected = re.sub(r"^\w+ should", "must", item["msg"].split(",")[0].removesuffix(" after validation"))
    return f"'{name}' {expected}, not {given}"


def _key(location: tuple[int | str, ...], values: Any) -> Key:
    """The location in an error without the tags that pydantic inserts where a union is told apart by `name`."""
    key: list[str] = []
    for part in location:
        if isinstance(values, dict) and part not in values and part == values.get("name", UNNAMED):
            continue
        key.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return tuple(key)


def nearest(key: Key) -> Key:
    """The valid key most like `key`: by its last name, and rather among its siblings, or else higher up."""

    def likeness(candidate: Key) -> float:
        alike = SequenceMatcher(None, candidate[-1], key[-1]).ratio() + 0.3 * (candidate[:-1] == key[:-1])
        return alike - 1e-3 * len(candidate)

    return max(_valid_keys(), key=likeness)


@cache
def _valid_keys() -> tuple[Key, ...]:
    schema = RunConfig.model_json_schema()
    return tuple(_properties(schema, schema["$defs"], ()))


def _properties(schema: dict[str, Any], definitions: dict[str, Any], prefix: Key) -> Iterator[Key]:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].removeprefix("#/$defs/")]
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _properties(choice, definitions, prefix)
    for name, inner in schema.get("properties", {}).items():
        yield (*prefix, name)
        yield from _properties(inner, definitions, (*prefix, name))
