"""Where the blocks of a U-Net stand: which they are, what they take and give, and what the encoder leaves the decoder.

One layout serves DDPM++, NCSN++, ADM and EDM2: per level of the encoder a halving (but for the first) and its blocks;
in the middle two blocks, of which the first may attend; per level of the decoder a doubling (but for the first) and
one block more than the encoder's, each given one of what the encoder left, the last first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resampling = Literal["keep", "down", "up"]


@dataclass(frozen=True)
class Place:
    """One block: channels in, out and appended (of the encoder's), and the resolution that it leaves, in pixels."""

    inputs: int
    outputs: int
    resolution: int
    resampling: Resampling = "keep"
    appended: int = 0
    attends: bool = False


@dataclass(frozen=True)
class Plan:
    """Blocks in the order in which they act."""

    encoder: tuple[Place, ...]
    decoder: tuple[Place, ...]

    @property
    def attended(self) -> list[Place]:
        return [place for place in (*self.encoder, *self.decoder) if place.attends]


def planned(
    side: int,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    *,
    sparse: bool = False,
    middle: bool = True,
) -> Plan:
    """The U-Net for images of `side` pixels.

    sparse: in the decoder only the last block of a level attends. middle: so does the first block of the middle.
    """
    encoder, left = _encoder(side, channels, multipliers, blocks, attention)
    decoder = []
    width, coarsest = left[-1], len(multipliers) - 1
    for level in range(coarsest, -1, -1):
        resolution, outputs = side >> level, channels * multipliers[level]
        if level == coarsest:
            decoder += [Place(width, width, resolution, attends=middle), Place(width, width, resolution)]
        else:
            decoder.append(Place(width, width, resolution, "up"))
        for number in range(blocks + 1):
            attends = resolution in attention and (number == blocks or not sparse)
            decoder.append(Place(width, outputs, resolution, appended=left.pop(), attends=attends))
            width = outputs
    return Plan(tuple(encoder), tuple(decoder))


def check_fit(plan: Plan, multipliers: tuple[int, ...], height: int, width: int, head_channels: int | None) -> None:
    """ValueError where images of this size do not fit. `head_channels` None: all channels are one head."""
    halvings = len(multipliers) - 1
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"network.multipliers halves images of {height}x{width} {halvings} times; give it fewer levels"
        )
    for place in plan.attended:
        if head_channels is not None and place.outputs % head_channels:
            raise ValueError(
                f"network.head_channels {head_channels} does not divide the {place.outputs} channels "
                f"at resolution {place.resolution}"
            )


def _encoder(
    side: int, channels: int, multipliers: tuple[int, ...], blocks: int, attention: tuple[int, ...]
) -> tuple[list[Place], list[int]]:
    """Its blocks, and the channels of all that it leaves, the embedded image first."""
    places, left = [], [channels]
    for level, multiplier in enumerate(multipliers):
        resolution, outputs = side >> level, channels * multiplier
        if level:
            places.append(Place(left[-1], left[-1], resolution, "down"))
            left.append(left[-1])
        for _ in range(blocks):
            places.append(Place(left[-1], outputs, resolution, attends=resolution in attention))
            left.append(outputs)
    return places, left
