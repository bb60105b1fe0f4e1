"""What pickled networks of PyTorch name: tensors, modules, numpy's arrays; and the tensors out of their storages."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sctrain.imports.inert import InertUnpickler, Name, NotInertError, Recorded, Source

_MODULE = re.compile(r"torch\.nn\.modules\.[a-z_]+")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's file format before 1.6
_TYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in _TYPES.values()}
_NUMPY = re.compile(r"[biuf][1248]")
MOST_DIMENSIONS = 8


@dataclass
class Storage:
    """The numbers of one or more tensors; `data` may come later than the tensors that are made of it."""

    dtype: torch.dtype
    count: int
    data: memoryview | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, which nobody has read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def check(self) -> None:
        """NotInertError if its numbers leave their storage."""
        storage, data = self.storage, self.storage.data
        if data is None or len(data) != storage.count * storage.dtype.itemsize:
            raise NotInertError("a tensor has no storage of its size")
        if prod(self.shape) > storage.count or (prod(self.shape) and self._last >= storage.count):
            raise NotInertError("a tensor claims more numbers than its storage has")

    def tensor(self) -> Tensor:
        """Its numbers, in memory of their own and in their own type. NotInertError as `check`."""
        self.check()
        dtype, data, width = self.storage.dtype, self.storage.data, self.storage.dtype.itemsize
        if not prod(self.shape):
            return torch.empty(self.shape, dtype=dtype)
        assert data is not None, "checked"
        own = torch.empty((self._last + 1 - self.offset) * width, dtype=torch.uint8)
        own.numpy()[:] = np.frombuffer(data[self.offset * width : (self._last + 1) * width], np.uint8)
        return own.view(dtype).as_strided(self.shape, self.strides).contiguous()

    @property
    def _last(self) -> int:
        """The place of its last number in the storage."""
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))


def network_names(nested: bool = True) -> Callable[[str, str], Name | None]:
    """The globals that a pickled network may name; storages in it only where `nested`."""
    known = {
        "torch._utils._rebuild_tensor_v2": Name("tensor", _tensor),
        "torch._utils._rebuild_tensor": Name("tensor", _tensor),
        "torch._utils._rebuild_parameter": Name("parameter", _parameter),
        "torch._utils._rebuild_parameter_with_state": Name("parameter", _parameter),
        "torch.Size": Name("Size", _listed),
        "torch.device": Name("device", lambda *words: Recorded("device", words)),
        "collections.OrderedDict": Name("OrderedDict", _dictionary, dict),
        "dnnlib.util.EasyDict": Name("EasyDict", _dictionary, dict),
        "builtins.set": Name("set", _listed),
        "__builtin__.set": Name("set", _listed),
        "_codecs.encode": Name("encode", _encoded),
        "copyreg._reconstructor": Name("reconstructor", _reconstructed),
        "copy_reg._reconstructor": Name("reconstructor", _reconstructed),
        "builtins.object": Name("object"),
        "__builtin__.object": Name("object"),
        "torch_utils.persistence._reconstruct_persistent_obj": Name("persistent", _persistent),
        **{f"torch.{name}": Name(name) for name in (*_TYPES, *_DTYPES)},
        **{f"torch.storage.{name}": Name(name) for name in ("UntypedStorage", "TypedStorage")},
        "numpy.ndarray": Name("ndarray"),
        "numpy.dtype": Name("dtype", lambda name, *_: Recorded("dtype", items={"name": name})),
        **{f"{home}.{name}": answer for home in ("numpy.core", "numpy._core") for name, answer in _ARRAYS},
    }
    if nested:
        known["torch.storage._load_from_bytes"] = Name("storage", _storage_file)

    def find(module: str, name: str) -> Name | None:
        if _MODULE.fullmatch(module):
            return Name(name, new=lambda: Recorded(name))
        return known.get(f"{module}.{name}")

    return find


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise NotInertError("a tensor is made of something that is no storage")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise NotInertError("a tensor has a shape that none can have")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise NotInertError("a parameter is made of something that is no tensor")
    return data


def _listed(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise NotInertError("a list is made of something else")
    return tuple(items)


def _dictionary(*pairs: Any) -> dict[Any, Any]:
    if not pairs:
        return {}
    (items,) = pairs
    if not isinstance(items, list) or not all(
        isinstance(item, list | tuple) and type(item[0]) is str for item in items
    ):
        raise NotInertError("a dictionary is made of something that is no list of pairs")
    return {key: value for key, value in items}


def _encoded(text: Any, coding: Any, *_: Any) -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", b"latin1"):
        raise NotInertError("it encodes something that is no text")
    return text.encode("latin1")


def _reconstructed(family: Any, base: Any, state: Any) -> Any:
    if not isinstance(family, Name) or family.new is None or not isinstance(base, Name) or state is not None:
        raise NotInertError("it makes an object of no class of a network's")
    return family.new()


def _persistent(about: Any) -> Recorded:
    """An object of EDM's and EDM2's, which carries the source code of its class; nobody looks at that."""
    if not isinstance(about, dict) or about.get("type") != "class" or type(about.get("class_name")) is not str:
        raise NotInertError("an object does not say what class it is of")
    return Recorded(about["class_name"], about.get("state"))


def _array(*_: Any) -> Recorded:
    return Recorded("ndarray")


def _scalar(kind: Any, data: Any) -> float | int | bool:
    return _numbers(kind, data)[0].item()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any, *_: Any) -> Recorded:
    return Recorded("ndarray", (1, shape, kind, order == "F", data))


_ARRAYS = (
    ("multiarray._reconstruct", Name("array", _array)),
    ("multiarray.scalar", Name("scalar", _scalar)),
    ("numeric._frombuffer", Name("array", _from_buffer)),
)


def as_array(value: Any) -> np.ndarray:
    """A recorded numpy array of numbers."""
    if not isinstance(value, Recorded) or value.name != "ndarray" or not isinstance(value.state, tuple):
        raise NotInertError("something is no array")
    _, shape, kind, by_columns, data = value.state
    numbers = _numbers(kind, data)
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise NotInertError("an array has a shape that none can have")
    if prod(shape) != len(numbers):
        raise NotInertError("an array has a shape that none can have")
    return numbers.reshape(shape, order="F" if by_columns else "C")


def _numbers(kind: Any, data: Any) -> np.ndarray:
    name = kind.items.get("name") if isinstance(kind, Recorded) else None
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    if not isinstance(name, str) or not _NUMPY.fullmatch(name) or not isinstance(data, bytes | memoryview):
        raise NotInertError("an array is not of numbers")
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
    big = order in (">", b">")
    return np.frombuffer(data, np.dtype(name).newbyteorder(">" if big else "<"))


def _storage_file(data: Any) -> Storage:
    """The storage in a file of its own inside the pickle."""
    if not isinstance(data, bytes | memoryview):
        raise NotInertError("a storage is made of something that is no file")
    found = read_stream(memoryview(data), nested=False)
    if not isinstance(found, Storage):
        raise NotInertError("a storage's file holds something else")
    return found


def storage_of(pid: Any, kept: dict[str, Storage]) -> Storage:
    """The storage that a persistent number names: ("storage", type, key, place, count, ...)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
        raise NotInertError("it refers to something that is no storage")
    kind, key, count = pid[1], pid[2], pid[4]
    key = key.decode("ascii", "replace") if isinstance(key, bytes) else key
    dtype = _TYPES.get(kind.name) if isinstance(kind, Name) else None
    if dtype is None or type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
        raise NotInertError("a storage is of no known type")
    if len(pid) > 5 and pid[5] is not None:
        raise NotInertError("a storage is a part of another")
    return kept.setdefault(key, Storage(dtype, count))


def read_stream(data: memoryview, nested: bool = True) -> Any:
    """What torch.save wrote before 1.6, or nests in pickles: three pickles, the object, its keys, the storages."""
    source, names, kept = Source(data), network_names(nested), {}

    def load() -> Any:
        return InertUnpickler(source, names, lambda pid: storage_of(pid, kept)).load()

    if load() != _MAGIC or load() != _PROTOCOL:
        raise NotInertError("it is no file of torch's")
    load()  # about the machine
    found, keys = load(), load()
    if not isinstance(keys, list):
        raise NotInertError("it does not say which storages follow")
    for key in keys:
        name = key.decode("ascii", "replace") if isinstance(key, bytes) else key
        count, storage = int.from_bytes(source.read(8), "little"), kept.get(name) if type(name) is str else None
        if storage is None or storage.count != count:
            raise NotInertError("a storage is not of the size that it was announced with")
        storage.data = source.view(count * storage.dtype.itemsize)
    return found
