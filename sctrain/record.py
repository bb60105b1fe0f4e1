"""How far a run is and how healthy: what a checkpoint says beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Record:
    """Everything here is the same on all ranks, and goes through JSON."""

    images: int = 0  # seen by this state of the weights
    skipped: int = 0  # steps dropped because the gradient was not finite
    skipped_in_row: int = 0  # dropped for whatever reason
    norms: tuple[float, ...] = ()  # gradient norms of the last steps taken
    spikes: int = 0  # steps dropped because the gradient's norm jumped
    recent_spikes: tuple[int, ...] = ()  # at which positions, of the last steps
    rollbacks: int = 0
    data_offset: int = 0  # samples that belong to abandoned futures: they are not seen again

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        """Out of what a checkpoint stores, which is more."""
        values: dict[str, Any] = {field.name: stored[field.name] for field in fields(cls)}
        values["norms"], values["recent_spikes"] = tuple(values["norms"]), tuple(values["recent_spikes"])
        return cls(**values)

    @property
    def position(self) -> int:
        """In the endless sequence of samples."""
        return self.images + self.data_offset

    def after_step(self, size: int, norm: float, *, applied: bool, spike: bool, window: int) -> Record:
        """The record after a step of `size` images. They count as seen also where the step was dropped.

        `window` is how many steps "the last" are.
        """
        norms, spikes = self.norms, self.recent_spikes
        if applied:
            norms = (*norms, norm)[-window:]
        if spike:
            spikes = (*spikes, self.position)
        return replace(
            self,
            images=self.images + size,
            skipped=self.skipped + (not applied and not spike),
            skipped_in_row=0 if applied else self.skipped_in_row + 1,
            norms=norms,
            spikes=self.spikes + spike,
            recent_spikes=tuple(at for at in spikes if at > self.position - window * size),
        )

    def rolled_back_to(self, earlier: Record) -> Record:
        """`earlier`, going on with the samples that come after this record's."""
        return replace(earlier, data_offset=self.position - earlier.images, rollbacks=self.rollbacks + 1)
