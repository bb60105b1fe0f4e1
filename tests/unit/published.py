"""Files of the structure that published weights have, made here: classes that pickle themselves as EDM's do."""

import io
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a published pickle was run")


def install() -> None:
    """The modules that the pickles name, for as long as they are written."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    sys.modules |= {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}


class EasyDict(dict):
    pass


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
SOURCE = "import os\nos.system('touch /tmp/run-by-a-pickle')\n"  # of a class, which nobody may run


class Persistent(nn.Module):
    """A module that pickles as its state, class name and source code."""

    class_name = "Module"

    def __reduce__(self) -> Any:
        state = {**self.__dict__, "_init_kwargs": getattr(self, "_init_kwargs", {})}
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


def persistent(name: str, parts: dict[str, Any], kwargs: dict[str, Any] | None = None, **attributes: Any) -> Persistent:
    """A module of class `name` with parameters, buffers and modules `parts`."""
    module = Persistent()
    module.class_name = name
    module._init_kwargs = EasyDict(kwargs or {})
    for key, part in parts.items():
        if isinstance(part, nn.Module):
            module.add_module(key, part)
        elif isinstance(part, nn.Parameter):
            module.register_parameter(key, part)
        else:
            module.register_buffer(key, part)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def tree(name: str, state: dict[str, torch.Tensor], kwargs: dict[str, Any], **attributes: Any) -> Persistent:
    """Persistent modules nested as the dotted names of `state` say."""
    root = persistent(name, {}, kwargs, **attributes)
    for dotted, tensor in state.items():
        *path, leaf = dotted.split(".")
        module: nn.Module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, persistent("Layer", {}))
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def dumped(value: Any, protocol: int = 4) -> bytes:
    """As `pickle.dump` writes it where those modules are."""
    before = dict(sys.modules)
    install()
    try:
        return pickle.dumps(value, protocol)
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


def legacy(value: Any) -> bytes:
    """As torch.save wrote before 1.6."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def ordered(state: dict[str, torch.Tensor]) -> "OrderedDict[str, torch.Tensor]":
    return OrderedDict(state)
