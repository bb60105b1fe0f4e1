"""Counts with binary suffixes."""

import re

_SUFFIX = {"": 1, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_PATTERN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*(Ki|Mi|Gi)?", re.IGNORECASE)


def parse_count(value: object) -> object:
    """Turn "8Mi" into 8388608; numbers pass through. Anything else is left for the validator to name."""
    if not isinstance(value, str):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    match = _PATTERN.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"'{value}' is not a count of images; write for example 4096, 64Ki or 8Mi")
    count = float(match[1].replace("_", "")) * _SUFFIX[(match[2] or "").lower()]
    if not count.is_integer():
        raise ValueError(f"'{value}' is not a whole number of images")
    return int(count)
