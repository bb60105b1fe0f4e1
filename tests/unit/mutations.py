"""Damage of every kind, the same for the same seed."""

import json
import random
from typing import Any

EXTREME = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00\x00\x00\x80",
    b"\xff\xff\xff\x7f",
    b"77777777777\x00",
    b"../",
    b"/",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, 0.5, 1e-320),
    *("", "..", "../x", "/etc/passwd", "a/b", "x\x00y", "\ud800", "9" * 400, "a" * 10_000, "0" * 64),
    *([], {}, [[]], [None] * 1000, {"": {}}, [1, 2, 3], ["x"], {"train": 1}),
)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """`data` with one to three things wrong."""
    for _ in range(choose.randint(1, 3)):
        data = choose.choice(_KINDS)(bytearray(data or b"\0"), choose)
    return data


def mutated_json(data: bytes, choose: random.Random) -> bytes:
    """A document with one value of another kind, a key too few or too many; or its text with something wrong."""
    if choose.random() < 0.3:
        return mutated(data, choose)
    if choose.random() < 0.02:
        return choose.choice([b"[", b'{"a":']) * choose.choice([100, 100_000])
    document = json.loads(data)
    _change(document, choose)
    return json.dumps(document).replace('"NaN"', "NaN").encode()


def _change(document: Any, choose: random.Random) -> None:
    """Somewhere in a tree of lists and dictionaries."""
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = choose.choice(keys) if keys else None
    if key is None:
        return
    inner = document[key]
    if isinstance(inner, dict | list) and inner and choose.random() < 0.7:
        _change(inner, choose)
    elif choose.random() < 0.15:
        del document[key]
    elif choose.random() < 0.1 and isinstance(document, dict):
        document[choose.choice(["", "x", "__class__", str(key) * 2])] = inner
    else:
        document[key] = choose.choice((*VALUES, "NaN"))


def _flip(data: bytearray, choose: random.Random) -> bytes:
    for _ in range(choose.randint(1, 8)):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(data)


def _overwrite(data: bytearray, choose: random.Random) -> bytes:
    place, what = choose.randrange(len(data)), choose.choice(EXTREME)
    data[place : place + len(what)] = what
    return bytes(data)


def _cut(data: bytearray, choose: random.Random) -> bytes:
    return bytes(data[: choose.randrange(len(data))])


def _remove(data: bytearray, choose: random.Random) -> bytes:
    start = choose.randrange(len(data))
    del data[start : start + choose.choice([1, 7, 512])]
    return bytes(data)


def _repeat(data: bytearray, choose: random.Random) -> bytes:
    start = choose.randrange(len(data))
    part = data[start : start + choose.choice([1, 30, 512, 2048])]
    return bytes(data[:start] + part * choose.choice([2, 3, 20]) + data[start:])


def _insert(data: bytearray, choose: random.Random) -> bytes:
    start = choose.randrange(len(data))
    return bytes(data[:start]) + choose.randbytes(choose.choice([1, 100, 512])) + bytes(data[start:])


def _erase(data: bytearray, choose: random.Random) -> bytes:
    start, size = choose.randrange(len(data)), choose.choice([1, 8, 512])
    data[start : start + size] = bytes(len(data[start : start + size]))
    return bytes(data)


def _move(data: bytearray, choose: random.Random) -> bytes:
    size, source, target = choose.choice([1, 12, 512]), choose.randrange(len(data)), choose.randrange(len(data))
    data[target : target + size] = data[source : source + size]
    return bytes(data)


def _digits(data: bytearray, choose: random.Random) -> bytes:
    """Numbers in text, as the sizes of a tar's members are."""
    places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    for place in choose.sample(places, min(len(places), choose.choice([1, 4, 12]))):
        data[place] = choose.choice(b"0178 -")
    return bytes(data)


_KINDS = (_flip, _flip, _overwrite, _cut, _remove, _repeat, _insert, _erase, _move, _digits)
