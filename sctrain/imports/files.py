"""The files that published weights come in: pickles of networks, torch's files of both formats, safetensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sctrain.errors import UserError
from sctrain.imports.inert import InertUnpickler, NotInertError, Recorded, Source, mapped
from sctrain.imports.torch_names import Storage, StoredTensor, network_names, read_stream, storage_of

MOST_MODULES = 20_000
_ZIP, _LEGACY = b"PK\x03\x04", pickle.dumps(0x1950A86A20F9469CFC6C, 2)


def read_file(path: Path) -> Any:
    """What the pickle or torch file at `path` holds, with stand-ins for objects and tensors.

    UserError, with nothing of the file run, where it is anything but plain values, modules and tensors.
    """
    try:
        data = mapped(path)
        if data[:4] == _ZIP:
            return _read_zip(path, data)
        if data[: len(_LEGACY)] == _LEGACY:
            return read_stream(data)
        return InertUnpickler(Source(data), network_names()).load()
    except NotInertError as error:
        raise refused(path, error) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file of published weights") from error


def refused(path: Path, error: NotInertError) -> UserError:
    return UserError(f"{path} is refused, and nothing in it was run: {error}; take the file from its publisher again")


def _read_zip(path: Path, data: memoryview) -> Any:
    """torch.save's present format: NAME/data.pkl and NAME/data/KEY, all stored without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            members = {entry.filename: _member(entry, data) for entry in entries}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise NotInertError(f"it is no archive of torch's ({error})") from error
    root = next((name[: -len("data.pkl")] for name in members if name.endswith("data.pkl")), None)
    if root is None or len(members) != len(entries):
        raise NotInertError("it is no archive of torch's")
    if bytes(members.get(f"{root}byteorder", b"little")) != b"little":
        raise NotInertError("its numbers are of another byte order")
    kept: dict[str, Storage] = {}
    found = InertUnpickler(
        Source(members[f"{root}data.pkl"]), network_names(), lambda pid: storage_of(pid, kept)
    ).load()
    for key, storage in kept.items():
        storage.data = members.get(f"{root}data/{key}")
    return found


def _member(entry: zipfile.ZipInfo, data: memoryview) -> memoryview:
    """The bytes of a member, in place: they follow its own header of 30 bytes, name and extra field."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise NotInertError("it is compressed, which torch's files are not")
    head = entry.header_offset
    if head < 0 or head + 30 > len(data) or data[head : head + 4] != _ZIP:
        raise NotInertError("it is no archive of torch's")
    start = head + 30 + sum(int.from_bytes(data[head + at : head + at + 2], "little") for at in (26, 28))
    if start + entry.file_size > len(data):
        raise NotInertError("it is cut short, or claims more bytes than it has")
    return data[start : start + entry.file_size]


def module_tensors(module: Recorded) -> dict[str, StoredTensor]:
    """Parameters and buffers of a recorded network by their dotted names, as `state_dict` names them."""
    found: dict[str, StoredTensor] = {}
    for prefix, state in modules(module):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _named(state.get(kind, {})):
                if isinstance(tensor, StoredTensor):
                    found[prefix + name] = tensor
                elif tensor is not None:
                    raise NotInertError(f"{prefix}{name} is no tensor")
    return found


def modules(root: Recorded) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix of its tensors' names, state) of a recorded network and all its parts."""
    left: list[tuple[str, Any]] = [("", root)]
    for _ in range(MOST_MODULES):
        if not left:
            return
        prefix, module = left.pop()
        state = module.state if isinstance(module, Recorded) else None
        if not isinstance(state, dict):
            raise NotInertError("a module holds something that is no module")
        yield prefix, state
        parts = [(f"{prefix}{name}.", part) for name, part in _named(state.get("_modules", {})) if part is not None]
        left += reversed(parts)
    raise NotInertError("it has more modules than any network, or some that hold themselves")


def _named(items: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(items, Mapping) or not all(type(name) is str for name in items):
        raise NotInertError("a module's parts have no names")
    yield from items.items()


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name that are read whenever they are asked for: of a large file never more than one is in memory."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:  # which else would read the tensor
        return name in self._readers

    def without_prefix(self, prefix: str) -> StoredTensors:
        """The same by names without `prefix`."""
        return StoredTensors({name.removeprefix(prefix): reader for name, reader in self._readers.items()})


def tensors_of(path: Path, stored: Mapping[str, StoredTensor]) -> StoredTensors:
    """The numbers of the tensors; UserError as for the file."""
    try:
        for tensor in stored.values():
            tensor.check()
    except NotInertError as error:
        raise refused(path, error) from error
    return StoredTensors({name: tensor.tensor for name, tensor in stored.items()})


def read_tensors(path: Path) -> StoredTensors:
    """A file of torch's that is a dictionary of tensors; UserError as for `read_file`."""
    found = read_file(path)
    if not isinstance(found, dict) or not all(isinstance(value, StoredTensor) for value in found.values()):
        raise refused(path, NotInertError("it holds no dictionary of tensors"))
    return tensors_of(path, found)


def read_safetensors(path: Path) -> StoredTensors:
    """Tensors by name."""
    try:
        file = safe_open(path, "pt")
        return StoredTensors({name: partial(file.get_tensor, name) for name in file.keys()})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file that can be read ({error})") from error
