"""Safetensors files written one tensor after the other: of a network of any size, one tensor is in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_BYTES = 4  # of an F32


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write float32 `tensors` by name, on the CPU, in the order of `shapes`; the file must not exist yet.

    The format has all shapes in front (https://github.com/huggingface/safetensors#format), so they are told first.
    """
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + _BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    wanted = iter(shapes.items())
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected = next(wanted, None)
            assert expected is not None and (name, list(tensor.shape)) == (expected[0], list(expected[1])), name
            assert tensor.dtype == torch.float32 and tensor.device.type == "cpu", name
            tensor.contiguous().numpy().tofile(file)
            del tensor  # before the next one is made
    assert next(wanted, None) is None, "a tensor is missing"
