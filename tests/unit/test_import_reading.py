"""Published files: their tensors arrive exactly, and nothing in a hostile one is ever run."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import dumped, legacy, persistent, saved, tree
from torch import nn

from sctrain.errors import UserError
from sctrain.imports.files import module_tensors, read_file, tensors_of
from sctrain.imports.inert import NotInertError, Recorded
from sctrain.imports.torch_names import StoredTensor, as_array

STATE = {
    "model.enc.32x32_conv.weight": torch.randn(4, 3, 3, 3),
    "model.enc.32x32_conv.bias": torch.randn(4).half(),
    "model.map_noise.freqs": torch.randn(8, 2).T,  # columns first
    "out_gain": torch.tensor(0.25),
    "count": torch.tensor([1, 2, 3]),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_network_arrives_exactly(tmp_path: Path, protocol: int):
    scale, table = np.sqrt(0.5), np.arange(6, dtype=np.float32).reshape(2, 3)
    net = tree("EDMPrecond", STATE, {"img_resolution": 32, "channel_mult": [1, 2]}, sigma_data=0.5, skip_scale=scale)
    net.add_module("list", nn.ModuleDict({"a": nn.Linear(2, 2)}))
    data = {"ema": net, "augment_pipe": persistent("AugmentPipe", {"Hz": torch.ones(2)}), "table": table}
    found = read_file(write(tmp_path / "net.pkl", dumped(data, protocol)))
    ema = found["ema"]
    assert isinstance(ema, Recorded) and ema.name == "EDMPrecond"
    assert ema.state["_init_kwargs"] == {"img_resolution": 32, "channel_mult": [1, 2]}
    assert (ema.state["sigma_data"], ema.state["skip_scale"]) == (0.5, scale)
    np.testing.assert_array_equal(as_array(found["table"]), table)
    inner = {f"list.a.{name}": tensor.data for name, tensor in net._modules["list"].a.named_parameters()}
    assert_same(tensors_of(tmp_path, module_tensors(ema)), STATE | inner)


def test_both_formats_of_torch(tmp_path: Path):
    state = STATE | {"b": torch.randn(3).bfloat16()}
    state["view"] = state["model.enc.32x32_conv.weight"][1:3, 0]
    for path in (saved(state, tmp_path / "zip.pt"), write(tmp_path / "legacy.pt", legacy(state))):
        found = read_file(path)
        assert all(isinstance(tensor, StoredTensor) for tensor in found.values())
        assert_same(tensors_of(path, found), state)


def test_an_empty_tensor_has_no_numbers(tmp_path: Path):
    path = saved({"none": torch.empty(0, 3)}, tmp_path / "empty.pt")
    assert tensors_of(path, read_file(path))["none"].shape == (0, 3)


class Trap:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path, function: Any = os.system):
        self.mark, self.function = mark, function

    def __reduce__(self) -> Any:
        return self.function, (f"touch {self.mark}",)


class StateTrap:
    """What runs when its state is set."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __setstate__(self, state: Any) -> None:
        os.system(f"touch {state['mark']}")


def nested(mark: Path) -> bytes:
    """The trap inside the storage of a tensor of a network, where torch's own reader would run."""
    inner = legacy({"x": 1}).replace(pickle.dumps({"x": 1}, 2)[2:-1], pickle.dumps(Trap(mark), 2)[2:-1])
    assert str(mark).encode() in inner

    class Storage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (inner,)

    return dumped({"ema": Storage()})


def in_the_state(mark: Path) -> bytes:
    net = tree("EDMPrecond", STATE, {})
    net.hook = Trap(mark)
    return dumped({"ema": net})


def by_name_of(module: str, name: str, *arguments: str) -> bytes:
    """A call of any global, written by hand."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in arguments)
    head = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
    return head + b"\x93" + b"(" + words + b"tR."


HOSTILE = {
    "os.system": lambda mark: dumped({"ema": Trap(mark)}),
    "eval": lambda mark: dumped(Trap(mark, eval)),
    "in a list of a state": in_the_state,
    "in a storage": nested,
    "by setstate": lambda mark: dumped(StateTrap(mark)),
    "torch.load": lambda mark: by_name_of("torch", "load", str(mark)),
    "getattr": lambda mark: by_name_of("builtins", "getattr", "os", "system"),
    "a dotted name": lambda mark: by_name_of("torch.nn.modules.container", "os.system", f"touch {mark}"),
    "a module of torch": lambda mark: by_name_of("torch.nn.modules.module", "warnings", f"touch {mark}"),
    "an instance": lambda mark: f"(ios\nsystem\nS'touch {mark}'\n.".encode(),
    "numpy's loader": lambda mark: by_name_of("numpy", "load", str(mark)),
    "an extension": lambda mark: b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("wrapped", ["pickle", "zip", "legacy"])
def test_nothing_hostile_is_run(tmp_path: Path, kind: str, wrapped: str):
    mark = tmp_path / "mark"
    data = HOSTILE[kind](mark)
    path = tmp_path / "net.pkl"
    if wrapped == "pickle":
        path.write_bytes(data)
    elif wrapped == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data.pkl", data)
            archive.writestr("net/byteorder", "little")
    else:
        head = legacy(0)
        path.write_bytes(head[: head.rindex(b"\x80\x02K\x00.")] + data)
    with pytest.raises(UserError, match=r"is refused, and nothing in it was run"):
        read_file(path)
    assert not mark.exists() and not Path("/tmp/run-by-a-pickle").exists()


def test_the_traps_work(tmp_path: Path):
    """Else the tests above could not fail."""
    for number, data in enumerate([dumped({"ema": Trap(tmp_path / "0")}), dumped([Trap(tmp_path / "1")])]):
        pickle.loads(data)
        assert (tmp_path / str(number)).exists()


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> bytes:
    numbers = torch.ones(4).storage()

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (numbers, offset, size, stride, False, {})

    return dumped({"x": Tensor()})


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        *(((5,), (1,), 0), ((2,), (1,), 3), ((1 << 40,), (0,), 0), ((2, 2), (2, 2), 0), ((1 << 60,), (1,), 0)),
        *(((-1,), (1,), 0), ((2,), (1, 1), 0), ((1,) * 9, (1,) * 9, 0), ((True,), (1,), 0)),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_stays_in_its_storage(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int):
    path = write(tmp_path / "net.pkl", rebuilt(size, stride, offset))
    with pytest.raises(UserError, match=r"is refused"):
        tensors_of(path, read_file(path))


def test_cut_short_anywhere(tmp_path: Path):
    state = {"weight": torch.randn(8), "bias": torch.randn(2)}
    files = [dumped({"ema": tree("EDMPrecond", state, {})}), legacy(state)]
    files.append(saved(state, tmp_path / "zip.pt").read_bytes())
    for data in files:
        for length in range(0, len(data) - 1, max(1, len(data) // 60)):
            path = write(tmp_path / "cut", data[:length])
            with pytest.raises(UserError):
                read_file(path)


def test_changed_bytes_are_read_or_refused(tmp_path: Path):
    generator = np.random.default_rng(0)
    state = {"weight": torch.randn(8), "bias": torch.randn(2)}
    files = [dumped({"ema": tree("EDMPrecond", state, {})}), legacy(state)]
    files.append(saved(state, tmp_path / "zip.pt").read_bytes())
    refusals = 0
    for data in files:
        for _ in range(300):
            changed = bytearray(data)
            for place in generator.integers(0, len(data), 3):
                changed[place] = generator.integers(256)
            path = write(tmp_path / "changed", bytes(changed))
            try:
                found = read_file(path)
                if isinstance(found, dict) and isinstance(found.get("ema"), Recorded):
                    found = module_tensors(found["ema"])
                items = found.items() if isinstance(found, dict) else ()
                tensors_of(path, {name: t for name, t in items if isinstance(t, StoredTensor)})
            except (UserError, NotInertError):
                refusals += 1
    assert refusals > 300


def test_bombs_end_soon(tmp_path: Path):
    """Nested tuples as keys, which take forever to hash; a million million bytes; a compressed archive."""
    shared = b"\x80\x04)\x94" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(100))
    for data in (
        shared + b"}h\x64K\x01s.",
        b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"K\x01" + b"2" * 100,
        b"",
        b"not a pickle",
    ):
        with pytest.raises(UserError, match=r"is refused"):
            read_file(write(tmp_path / "bomb", data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", dumped({}))
        archive.writestr("net/data/0", bytes(10**7))
    with pytest.raises(UserError, match=r"compressed"):
        read_file(write(tmp_path / "bomb.pt", buffer.getvalue()))


def test_a_module_that_holds_itself(tmp_path: Path):
    net = tree("EDMPrecond", {"weight": torch.ones(1)}, {})
    found = read_file(write(tmp_path / "net.pkl", dumped(net)))
    found.state["_modules"] = {"a": found, "b": found}
    with pytest.raises(NotInertError, match=r"more modules"):
        module_tensors(found)
    found.state["_modules"] = {"a": 1}
    with pytest.raises(NotInertError, match=r"no module"):
        module_tensors(found)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone.pkl cannot be read \(No such file"):
        read_file(tmp_path / "gone.pkl")
