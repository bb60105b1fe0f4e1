"""F with its graph and dF without one, in three interchangeable ways.

    (outputs, t_first) = engine(network, (u, t), (t_u, t_t), *constants)

`network` returns a tuple of tensors. All of them come back with their graph, and the first one's tangent along
(t_u, t_t), which never has one (recorded.py gives one that has). All three draw one dropout mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.tangent.dual import Dual, value_of
from models.tangent.precision import tangent_precision
from models.tangent.randomness import RandomState

Result = tuple[tuple[Tensor, ...], Tensor]
Network = Callable[..., Sequence[Tensor]]


def single_pass(network: Network, primals: Sequence[Tensor], tangents: Sequence[Tensor], *constants: Tensor) -> Result:
    """One traversal: parameters are gathered once, and the tangent leaves no graph."""
    first, *others = network(*map(Dual, primals, tangents), *constants)
    t_first = first.tangent if isinstance(first, Dual) else torch.zeros_like(first)
    return tuple(map(value_of, (first, *others))), t_first


def two_pass(network: Network, primals: Sequence[Tensor], tangents: Sequence[Tensor], *constants: Tensor) -> Result:
    """The value by an ordinary pass, the tangent by a pass of its own: the reference that `single_pass` must equal."""
    randomness = RandomState(primals[0].device)
    outputs = network(*primals, *constants)
    with torch.no_grad(), randomness.replayed():
        _, t_first = single_pass(network, primals, tangents, *constants)
    return tuple(outputs), t_first


def finite_difference(
    network: Network, primals: Sequence[Tensor], tangents: Sequence[Tensor], *constants: Tensor, step: float = 1e-3
) -> Result:
    """By central differences along the same direction: the independent check, in float32 or better.

    Three evaluations; its error is O(step^2) plus rounding of about 1e-7 / step in float32.
    """
    randomness = RandomState(primals[0].device)
    outputs = network(*primals, *constants)
    moved = []
    for sign in (1, -1):
        with torch.no_grad(), randomness.replayed():
            shifted = (p + sign * step * t for p, t in zip(primals, tangents, strict=True))
            moved.append(network(*shifted, *constants)[0])
    return tuple(outputs), (moved[0] - moved[1]) / (2 * step)


TANGENT_ENGINES = {"single_pass": single_pass, "two_pass": two_pass, "finite_difference": finite_difference}


def tangent_engine(name: str, least: torch.dtype | None = None) -> Callable[..., Result]:
    """An engine by name; its tangents have at least that precision, None: the values'."""

    def engine(*arguments: Any) -> Result:
        with tangent_precision(least):
            return TANGENT_ENGINES[name](*arguments)

    return engine
