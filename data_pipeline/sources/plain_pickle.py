"""Pickles that hold arrays and plain values, read without running anything of theirs.

Every global that a pickle names is refused, but for numpy's three words for an array; and even these are answered with
stand-ins that only remember what they are given, so not one function of the pickle's choice is ever called.
"""

import io
import pickle
import struct
from typing import Any, ClassVar

import numpy as np

# What the unpickler raises for bytes that are no pickle.
_NO_PICKLE = (
    *(pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, TypeError, AttributeError),
    *(OverflowError, MemoryError, RecursionError, struct.error),
)


class NotPlainError(Exception):
    """Why bytes are not a pickle of arrays and plain values."""


class _Type:
    """Stands in for numpy.dtype: remembers its name and byte order."""

    def __init__(self, name: Any, *_: Any):
        self.name = _text(name)

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like, which one byte does not have


class _Array:
    """Stands in for numpy.ndarray: remembers shape, type and bytes."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, data = state
        if not isinstance(kind, _Type) or kind.name != "u1" or by_columns not in (False, True):
            raise NotPlainError("an array is not of bytes")
        if not isinstance(data, bytes):
            raise NotPlainError("an array has no bytes")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Reconstruct:
    """Stands in for numpy's function that makes the empty array which its state then fills."""

    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()

    def __setstate__(self, state: Any) -> None:
        raise NotPlainError("it changes a function")


_KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
}


class _Unpickler(pickle._Unpickler):  # the one in C reserves whatever memory a pickle claims to need
    dispatch: ClassVar = {op: load for op, load in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise NotPlainError(f"it names {module}.{name}, which no array needs")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise NotPlainError("it refers to something outside itself")


def read_plain(data: bytes) -> dict[bytes, Any]:
    """The dictionary in a pickle; strings of Python 2 are bytes, arrays of uint8. NotPlainError for anything else."""
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except NotPlainError:
        raise
    except _NO_PICKLE as error:
        raise NotPlainError(f"it is no pickle of arrays: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise NotPlainError("it is not a dictionary")
    return {_bytes(key): _value(value) for key, value in found.items()}


def _value(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def _text(name: Any) -> str:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)


def _bytes(key: Any) -> bytes:
    return key if isinstance(key, bytes) else str(key).encode()
