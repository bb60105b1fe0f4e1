"""What every objective is: pure tensor mathematics, split into what is random and what is not.

    draws = objective.draw(generator, batch, progress)     # times, noise, dropped labels: keyed by (seed, position)
    loss = objective.loss(draws, networks)                 # per-sample losses and named per-sample diagnostics

No distributed calls, no I/O. The same objective runs on a two-dimensional toy, in a float64 test and on many GPUs.
Shapes: images (B, C, H, W); times, labels, losses and diagnostics (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from models.tangent.randomness import RandomState
from sctrain.parameterization import Network
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

    @property
    def done(self) -> float:
        """The part of the budget, in [0, 1]."""
        return min(1.0, self.images / self.budget)


@dataclass(frozen=True)
class Draws:
    """Everything random of one batch, and the warm-up factor r in [0, 1]."""

    x0: Tensor
    z: Tensor  # noise of standard deviation sigma_data
    t: Tensor
    labels: Tensor  # after label dropout; num_classes means none
    r: float = 1.0
    guidance: Tensor | None = None  # scale of classifier-free guidance, for networks that are told it
    s: Tensor | None = None  # the less noisy time of methods that compare two, or where a jump ends
    augmentation: Tensor | None = None  # (B, 9) by which x0 was transformed, for networks that are told it

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What a network takes after (u, t); None for what this one is not told."""
        if self.augmentation is not None:
            return self.labels, self.guidance, None, self.augmentation
        return (self.labels,) if self.guidance is None else (self.labels, self.guidance)


# (F, w) with their graph and dF without: (network, (u, t), (t_u, t_t), *conditions) -> ((F, w), t_F).
TangentEngine = Callable[..., tuple[tuple[Tensor, ...], Tensor]]


Judge = Callable[[Tensor, Tensor], Tensor]  # (B, C, H, W), labels (B,) -> logits (B, patches)


class Adversary(NamedTuple):
    """A discriminator, twice: as it judges images that want gradients, and as its engine trains it."""

    judge: Judge
    trained: Judge


class Guide(NamedTuple):
    """A lesser diffusion model, away from which the teacher is guided, and the label that it is told; None: its own."""

    network: Network
    no_label: int | None


@dataclass(frozen=True)
class Networks:
    """What an objective may evaluate. Teacher and target have no gradients, but a graph to inputs that want theirs.

    The target is an average of the student or an earlier self of it; without one it is the student itself. `mean` is
    that of a tensor of equal shape over all ranks: of a single process, the tensor.
    """

    student: Network
    tangent: TangentEngine
    teacher: Network | None = None
    target: Network | None = None
    mean: Callable[[Tensor], Tensor] = lambda values: values
    adversary: Adversary | None = None
    guide: Guide | None = None
    # Of a diffusion model of what the student draws: (u, t, labels, guidance, t') -> F, and w(t) with w'(t') as (B, 2).
    score: Network | None = None

    def pair(
        self, at: tuple[Tensor | None, ...], target_at: tuple[Tensor | None, ...]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(F, w) of the student at its inputs, F of the target at others without a graph: under one dropout mask."""
        assert at[0] is not None, "u comes first"
        randomness = RandomState(at[0].device)
        outputs = self.student(*at)
        with torch.no_grad(), randomness.replayed():
            F_target, _ = (self.target or self.student)(*target_at)
        return outputs, F_target


@dataclass(frozen=True)
class Loss:
    """Per-sample losses (B,), diagnostics (B,) by name, and which samples (B,) were dropped: their loss is 0.

    `times` (B,) are of those diagnostics that were taken at another time than the draws' t. `beside` (B,) are those of
    the network that is trained beside the student, with a graph to its weights alone.
    """

    per_sample: Tensor
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    dropped: Tensor | None = None
    times: dict[str, Tensor] = field(default_factory=dict)
    beside: Tensor | None = None


class Objective(Protocol):
    """One training objective."""

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws: ...

    def loss(self, draws: Draws, networks: Networks) -> Loss: ...

    def target_keep(self, before: Progress, after: Progress) -> float | None:
        """The part of the target network that an optimizer step leaves; None: there is no target."""
        ...
