"""A value and its tangent as one tensor, which ordinary PyTorch code passes on.

`Dual(value, tangent)` takes part in PyTorch's `__torch_function__` protocol: `nn.Linear`, `F.silu`, `x + y` and
`x.reshape` work on it as they are. Every such call runs the function itself on the values, where autograd records it as
always, and a *rule* for the tangents, which nothing records. So one traversal of a network gives F with its graph and
dF without one, at the memory of F alone. A function without a rule gets its tangent from PyTorch's forward mode, at the
price of evaluating it twice; one that would lose a tangent or cut a graph is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from models.tangent.precision import tangent_dtype

# (function, args, kwargs), any of whose tensors may be Duals -> what the function returns, with Duals for tensors.
Rule = Callable[[Callable, tuple, dict], Any]
RULES: dict[str, Rule] = {}  # by the function's name: `torch.add`, `Tensor.add` and `+` are the same thing

# Questions about the tensor, not functions of it: the value answers them.
_ABOUT = frozenset(
    "shape dtype device layout ndim size dim numel nelement stride is_contiguous storage_offset element_size __len__ "
    "is_floating_point is_complex is_cuda is_cpu is_meta get_device requires_grad grad_fn is_leaf grad register_hook "
    "names is_quantized is_sparse is_nested is_same_size output_nr".split()
)


class Dual(Tensor):
    """A value with its autograd graph, and a tangent of the same shape without one.

    The tangent is a plain tensor in the value's dtype, or in a wider one (see precision.py).
    """

    value: Tensor
    tangent: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, tangent: Tensor) -> Dual:
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)

    def __init__(self, value: Tensor, tangent: Tensor):
        super().__init__()
        assert value.shape == tangent.shape, f"tangent of shape {tuple(tangent.shape)} for {tuple(value.shape)}"
        assert not tangent.requires_grad, "a tangent never has a graph"
        self.value, self.tangent = value, tangent

    def __repr__(self) -> str:
        return f"Dual(value={self.value}, tangent={self.tangent})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        with torch._C.DisableTorchFunctionSubclass():
            if name in _ABOUT:
                return func(*values(args), **values(kwargs))
            _refuse_loss(name, args, kwargs)
            return RULES.get(name, _by_forward_ad)(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError(f"{func} reached a Dual past its rules: write it with PyTorch's Python functions")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the functions of these names."""

    def register(made: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, made))
        return made

    return register


def tangent_rule(*names: str) -> Callable[[Callable], Callable]:
    """Register `tangent(out, *args, **kwargs)` for functions that run on the values as they are.

    It gets the function's result and its arguments, Duals among them, and is evaluated without recording.
    """

    def register(tangent: Callable) -> Callable:
        def both(function: Callable, args: tuple, kwargs: dict) -> Dual:
            out = function(*values(args), **values(kwargs))
            with torch.no_grad():
                return Dual(out, tangent(out, *args, **kwargs).to(tangent_dtype(out.dtype)))

        RULES.update(dict.fromkeys(names, both))
        return tangent

    return register


def values(tree: Any) -> Any:
    """The same arguments with every Dual replaced by its value."""
    return _mapped(tree, lambda x: x.value if isinstance(x, Dual) else x)


def value_of(x: Tensor) -> Tensor:
    """The value of a Dual, or the plain tensor itself: for what is to be a constant of the differentiation."""
    return x.value if isinstance(x, Dual) else x


def tangent_of(x: Any) -> Tensor | None:
    """The tangent of a Dual; None, which stands for zero, of anything else."""
    return x.tangent if isinstance(x, Dual) else None


def paired(value: Any, tangent: Any) -> Any:
    """Duals of results that are tensors or sequences of them."""
    if isinstance(value, Tensor):
        return Dual(value, tangent)
    return type(value)([paired(v, t) for v, t in zip(value, tangent, strict=True)])


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)([_mapped(item, change) for item in tree])
    if isinstance(tree, Mapping):
        return {key: _mapped(item, change) for key, item in tree.items()}
    return change(tree)


def _name(function: Callable) -> str:
    """`add` for torch.add, Tensor.add, Tensor.add.__radd__; the attribute's name for a getter."""
    name = function.__name__
    if name == "__get__":
        return function.__self__.__name__  # pyright: ignore[reportFunctionMemberAccess]
    return name


def _refuse_loss(name: str, args: tuple, kwargs: dict) -> None:
    """What would drop a tangent or a graph without a word."""
    if name in ("detach", "data", "requires_grad_", "__set__", "numpy", "item", "tolist"):
        raise NotImplementedError(f"'{name}' of a Dual would lose its tangent; take value_of(x) where that is meant")
    if (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or kwargs.get("out") is not None:
        raise NotImplementedError(f"'{name}' changes a tensor in place, which a Dual does not follow; write x = f(x)")
    if not torch.is_grad_enabled() and any(value.requires_grad for value in _duals_values(args)):
        raise NotImplementedError(f"'{name}' under no_grad would cut the graph of a Dual's value")


def _duals_values(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(tree, lambda x: found.append(x.value) if isinstance(x, Dual) else None)
    return found


def _by_forward_ad(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The tangent of any differentiable function, by PyTorch's own forward mode on values cut from the graph."""
    out = function(*values(args), **values(kwargs))
    with torch.no_grad(), forward_ad.dual_level():
        duals = _mapped((args, kwargs), lambda x: _forward_dual(x) if isinstance(x, Dual) else x)
        moved = function(*duals[0], **duals[1])
        tangents = _mapped(moved, lambda x: forward_ad.unpack_dual(x).tangent if isinstance(x, Tensor) else None)
    return _paired_where_it_moves(out, tangents)


def _forward_dual(x: Dual) -> Tensor:
    return forward_ad.make_dual(x.value.detach(), x.tangent.to(x.value.dtype))


def _paired_where_it_moves(out: Any, tangent: Any) -> Any:
    """Results without a tangent (comparisons, rounding, zeros_like) are constants: plain tensors."""
    if isinstance(out, tuple | list):
        return type(out)([_paired_where_it_moves(o, t) for o, t in zip(out, tangent, strict=True)])
    return out if tangent is None else Dual(out, tangent.to(tangent_dtype(out.dtype)))
