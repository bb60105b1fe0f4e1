"""What every objective is: pure tensor mathematics, split into what is random and what is not.

    draws = objective.draw(generator, batch, progress)     # times, noise, dropped labels: keyed by (seed, position)
    loss = objective.loss(draws, networks)                 # per-sample losses and named per-sample diagnostics

No distributed calls, no I/O. The same objective runs on a two-dimensional toy, in a float64 test and on many GPUs.
Shapes: images (B, C, H, W); times, labels, losses and diagnostics (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sctrain.randomness import SampleGenerator


@dataclass(frozen=True)
class Batch:
    """Clean images in model space (standard deviation sigma_data) and their classes."""

    x0: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Progress:
    """How far the run is, in images."""

    images: int
    budget: int


@dataclass(frozen=True)
class Draws:
    """Everything random of one batch, and the warm-up factor r in [0, 1]."""

    x0: Tensor
    z: Tensor  # noise of standard deviation sigma_data
    t: Tensor
    labels: Tensor  # after label dropout; num_classes means none
    r: float = 1.0
    guidance: Tensor | None = None  # scale of classifier-free guidance, for networks that are told it

    @property
    def conditions(self) -> tuple[Tensor, ...]:
        """What a network takes after (u, t)."""
        return (self.labels,) if self.guidance is None else (self.labels, self.guidance)


# F and w of a network at (u, t, labels), u = x_t / sigma_data; a guided one takes the scale after the labels.
Network = Callable[..., tuple[Tensor, Tensor]]
# (F, w) with their graph and dF without: (network, (u, t), (t_u, t_t), *conditions) -> ((F, w), t_F).
TangentEngine = Callable[..., tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Networks:
    """What an objective may evaluate. The teacher's evaluations must carry no graph."""

    student: Network
    tangent: TangentEngine
    teacher: Network | None = None


@dataclass(frozen=True)
class Loss:
    """Per-sample losses (B,), diagnostics (B,) by name, and which samples (B,) were dropped: their loss is 0."""

    per_sample: Tensor
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    dropped: Tensor | None = None


class Objective(Protocol):
    """One training objective."""

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws: ...

    def loss(self, draws: Draws, networks: Networks) -> Loss: ...
