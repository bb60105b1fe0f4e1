"""A network that has its structure and none of its weights: they are drawn one parameter at a time, wherever needed.

The constructor runs on torch's meta device, where tensors have shapes alone, while every operation that it asks for is
written down. A parameter's initial values are what its own operations give when they are done for real, with random
numbers keyed by (seed, name). So nobody ever holds a whole network, and the values depend on neither the number of
ranks nor the order of construction. Constructors need nothing of this: they are plain nn.Modules.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Values(Protocol):
    """Weights by parameter name that are read piece by piece."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) float32 on the CPU: that interval of the flattened parameter."""
        ...


class Blueprint:
    """What `make` would construct. It holds no weights, and no more memory than that takes."""

    def __init__(self, make: Callable[[], nn.Module]):
        """`make` may not look at the values of its tensors, nor make random buffers, which no checkpoint holds."""
        with _Recorder() as self._recorder:
            self._meta = make()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._meta.named_parameters()}
        self._parameters = dict(self._meta.named_parameters())
        assert len(self._parameters) == len(list(self._meta.named_parameters(remove_duplicate=False))), "shared weights"

    def skeleton(self) -> nn.Module:
        """The network with parameters on the meta device and buffers that are real."""
        network = copy.deepcopy(self._meta)
        for path, module in network.named_modules():
            for name in module._buffers:
                if module._buffers[name] is not None:
                    original = self._meta.get_submodule(path)._buffers[name]
                    assert original is not None
                    module._buffers[name] = self._recorder.replay(original, None)
        return network

    def draw(self, name: str, seed: int) -> Tensor:
        """Initial values of one parameter: float32, whole, on the CPU."""
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        return self._recorder.replay(self._parameters[name], int.from_bytes(digest[:8]) % 2**63)

    def whole(self, values: Values) -> nn.Module:
        """The network on one device, with all of its weights."""
        network = self.skeleton()
        for name, owner, short, parameter in owned(network):
            read = values.read(name, 0, parameter.numel()).view(parameter.shape)
            owner._parameters[short] = nn.Parameter(read, parameter.requires_grad)
        return network


@dataclass(frozen=True)
class InitialValues:
    """Fresh weights of a network, as its constructor asks for them."""

    blueprint: Blueprint
    seed: int

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """That interval of the flattened parameter, as a view of all of it."""
        return self.blueprint.draw(name, self.seed).flatten()[start:stop]


def owned(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module that has it, its name there, parameter): what it takes to put another in its place."""
    for name, parameter in list(network.named_parameters()):
        path, _, short = name.rpartition(".")
        yield name, network.get_submodule(path), short, parameter


@dataclass(frozen=True)
class _Operation:
    function: Any
    arguments: tuple[tuple, dict]  # as called; tensors of the meta device stand for those that a replay makes
    result: Any

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.function.tags


class _Recorder(TorchDispatchMode):
    """Turns construction into shapes, and writes down how each tensor came to be."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[_Operation] = []
        self._touching: dict[int, list[int]] = defaultdict(list)  # storage -> operations that make or change it

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        makes = not given and any(argument.name == "device" for argument in func._schema.arguments)
        if not makes and not any(x.is_meta for x in given):
            return func(*args, **kwargs)  # of constants alone
        shadow_args, shadow_kwargs = tree_map(_shadow, (args, kwargs))
        result = func(*shadow_args, **(shadow_kwargs | ({"device": torch.device("meta")} if makes else {})))
        self._note(_Operation(func, (args, kwargs), result))
        return result

    def _note(self, operation: _Operation) -> None:
        for tensor in tree_leaves(operation.result):
            if isinstance(tensor, Tensor):
                self._touching[_storage(tensor)].append(len(self._operations))
        self._operations.append(operation)

    def replay(self, tensor: Tensor, key: int | None) -> Tensor:
        """The values of a tensor that construction made; random numbers are those of `key`, and without one refused."""
        made: dict[int, Tensor] = {}  # by storage: tensors are views of these
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if key is not None:
                torch.manual_seed(key)
            for index in sorted(self._needed(tensor)):
                operation = self._operations[index]
                assert key is not None or not operation.is_random, "a buffer may not be random: no checkpoint holds it"
                args, kwargs = tree_map(partial(_real, made), operation.arguments)
                results = tree_leaves(operation.function(*args, **kwargs))
                for meta, real in zip(tree_leaves(operation.result), results, strict=True):
                    if isinstance(meta, Tensor):
                        assert meta.stride() == real.stride(), "torch lays this tensor out in another way on meta"
                        made.setdefault(_storage(meta), real)
        return _real(made, tensor)

    def _needed(self, tensor: Tensor) -> set[int]:
        """Operations that its values depend on."""
        needed: set[int] = set()
        pending = [_storage(tensor)]
        while pending:
            for index in self._touching.get(pending.pop(), ()):
                if index not in needed:
                    needed.add(index)
                    leaves = tree_leaves(self._operations[index].arguments)
                    pending += [_storage(x) for x in leaves if isinstance(x, Tensor) and x.is_meta]
        return needed


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _real(made: dict[int, Tensor], x: Any) -> Any:
    """In place of a tensor of the meta device, the same view of a real one."""
    if not isinstance(x, Tensor) or not x.is_meta:
        return x
    base = made[_storage(x)]
    return base.new_empty(0).set_(base.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _shadow(x: Any) -> Any:
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) and not x.is_meta else x
