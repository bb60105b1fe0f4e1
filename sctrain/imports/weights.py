"""Published weights once they are read: how they are to be understood, and all of a network of ours made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.latents import ConventionName
from sctrain.errors import UserError
from sctrain.imports.layouts import Layout


@dataclass(frozen=True)
class Published:
    """Weights as published, and how they are to be understood."""

    source: Path
    family: str  # in words
    layout: Layout
    tensors: Mapping[str, Tensor]
    licence: str
    turned: bool  # the network adds to c_skip x as c_out F, so TrigFlow's F is the negative
    objective: Mapping[str, Any]
    space: Mapping[str, Any] = field(default_factory=dict)  # sigma_data, noise_input, network_output
    latents: ConventionName | None = None
    images: int | None = None  # that it was trained on
    width: float | None = None  # of its EMA

    def weights(self, network: nn.Module, side: int) -> dict[str, Tensor]:
        """All weights of a network with the shapes of `network`, float32.

        What belongs to training alone and was not published is zero. UserError unless every published tensor has its
        place, and of the same shape.
        """
        asked = _Asked(self.tensors)
        found = self.layout.renamed(asked, network, side)
        if self.turned:
            found = _turned(found)
        own = network.state_dict()
        for name, tensor in own.items():
            if name not in found and name.startswith("weighting."):
                found[name] = torch.zeros(tensor.shape)
        left = [name for name in self.tensors if name not in asked.names and not self.layout.unused.fullmatch(name)]
        if left:
            raise UserError(f"{self.source} has tensors that no part of '{self.layout.options.name}' is for: {left[0]}")
        for name in sorted(own.keys() | found.keys()):
            ours, theirs = own.get(name), found.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                shapes = " and ".join("absent" if w is None else str(tuple(w.shape)) for w in (ours, theirs))
                raise UserError(f"{self.source}: {name} is {shapes} in '{self.layout.options.name}' and in the file")
        for name in found:  # one at a time: of a large network not two copies
            found[name] = found[name].float().contiguous()
        return found


class _Asked(Mapping[str, Tensor]):
    """Remembers which of its tensors were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def _turned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """-F: the last layer with its sign changed; where only directions count, its gain."""
    last = ("head.gain",) if "head.gain" in weights else ("head.weight", "head.bias")
    return weights | {name: -weights[name] for name in last}
