"""Lets several evaluations of a network draw the same dropout masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The state of a device's generator when this was made."""

    def __init__(self, device: torch.device):
        self._module = torch.cuda if device.type == "cuda" else torch.random
        self._state = self._module.get_rng_state()

    def rewind(self) -> None:
        """Draw again what followed."""
        self._module.set_rng_state(self._state)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what followed inside, and leave the generator as it is now."""
        now = self._module.get_rng_state()
        self.rewind()
        try:
            yield
        finally:
            self._module.set_rng_state(now)
