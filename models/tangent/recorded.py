"""A tangent with its graph, for losses that are differentiated *through* dF.

PyTorch's own forward mode (torch.func.jvp) gives it, where the forward mode of every operation is itself recorded. That
of an autograd.Function with a `jvp` of its own is not: the value of the tangent is right, its gradient is not, and
nothing says so. Such functions must ask `recording` and be plain arithmetic then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def recording() -> bool:
    """Whether tangents that pass now are to have a graph."""
    return _RECORDING.get()


@contextmanager
def _recording() -> Iterator[None]:
    token = _RECORDING.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # of PyTorch's attentions the one with a forward mode
            yield
    finally:
        _RECORDING.reset(token)


def recorded(
    network: Callable[..., Sequence[Tensor]],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *constants: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(outputs, t_first) as the engines of engines.py give them, but t_first has a graph too.

    Its memory is several times theirs, and parameters must stay where they are until backward: not under ZeRO-3.
    """

    def first_and_others(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        first, *others = network(*inputs, *constants)
        return first, tuple(others)

    with _recording():
        results: Any = torch.func.jvp(first_and_others, tuple(primals), tuple(tangents), has_aux=True)
    first, t_first, others = results
    return (first, *others), t_first
