"""safetensors files written and read one tensor, or one piece of a tensor, at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Write float32 tensors, which come in the order of `shapes`, and hold none of them; the file is on the disk then.

    Returns its size in bytes and sha256, taken of what was to be written, not of what a disk made of it.
    """
    header = _header(shapes)
    digest, count, names = hashlib.sha256(header), len(header), iter(shapes)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            assert name == next(names, None) and tuple(tensor.shape) == tuple(shapes[name]), f"{name} is unexpected"
            assert tensor.dtype == torch.float32, f"{name} is not float32"
            raw = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            file.write(raw)
            digest.update(raw)
            count += len(raw)
            del tensor, raw  # before the next one is made
        assert next(names, None) is None, "some tensors did not come"
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": count, "sha256": digest.hexdigest()}


def _header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    entries, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """An open safetensors file, whose tensors are read as flat pieces."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,): that interval of the flattened tensor; whole rows of it are read, and no more."""
        stored = self._file.get_slice(name)
        shape = stored.get_shape()
        row = math.prod(shape[1:])
        if not shape or not row or stop <= start:
            return self._file.get_tensor(name).flatten()[start:stop]
        first = start // row
        return stored[first : -(-stop // row)].flatten()[start - first * row : stop - first * row]
