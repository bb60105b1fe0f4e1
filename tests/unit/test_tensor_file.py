"""safetensors files written and read in pieces are what the library writes and reads whole."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from sctrain.tensor_file import TensorFile, write_tensors

TENSORS = {
    "matrix": torch.randn(5, 7),
    "filter": torch.randn(3, 2, 3, 3),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0),
    "row": torch.randn(1, 11),
    "name with \u00fc": torch.randn(4).expand(3, 4),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    about = write_tensors(path, SHAPES, iter(TENSORS.items()))
    read = load_file(path)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    content = path.read_bytes()
    assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", TENSORS)
def test_every_piece(tmp_path, name):
    write_tensors(tmp_path / "a.safetensors", SHAPES, TENSORS.items())
    file, flat = TensorFile(tmp_path / "a.safetensors"), TENSORS[name].flatten()
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert torch.equal(file.read(name, start, stop), flat[start:stop])


@pytest.mark.parametrize(
    "tensors", [{"a": torch.zeros(3)}, {"b": torch.zeros(2)}, {}, {"a": torch.zeros(2), "b": torch.zeros(2)}]
)
def test_what_was_not_announced_is_refused(tmp_path, tensors):
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "a.safetensors", {"a": (2,)}, tensors.items())


def test_other_types_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="not float32"):
        write_tensors(tmp_path / "a.safetensors", {"a": (2,)}, [("a", torch.zeros(2).double())])
