"""In which precision tangents are kept and multiplied, apart from the values'.

A value in bfloat16 may travel with a tangent in float32: its tangent is then exact, to float32, at the rounded value.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_least: torch.dtype | None = None


@contextmanager
def tangent_precision(least: torch.dtype | None) -> Iterator[None]:
    """Tangents that are made inside have at least this precision, and products with them are computed in it.

    None means the value's own. A value in a wider dtype always has its tangent in that dtype.
    """
    global _least
    before, _least = _least, least
    try:
        yield
    finally:
        _least = before


def tangent_dtype(value: torch.dtype) -> torch.dtype:
    """Of the tangent of a value of this dtype."""
    return value if _least is None else torch.promote_types(value, _least)


def factors(tangent: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A tangent and the values that it is multiplied with, in the tangent's dtype: matrix products mix none."""
    return tangent, *(x.to(tangent.dtype) for x in others)
