"""How long a step takes, from what it computes and sends. A model, until both rates are measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.planning.counting import Counted
from sctrain.planning.memory import Layout

# Assumed where there is no bench file: an A100's dense matrix peak by precision, of which 40% is reached; NVLink
# inside a node, and one 200 Gb/s adapter per GPU between nodes.
_PEAK_FLOPS = {"bf16": 312e12, "fp32": 156e12}
_REACHED = 0.4
_INSIDE, _BETWEEN = 200e9, 25e9
GPUS_PER_NODE = 8
UNMEASURED = "model, unmeasured"


@dataclass(frozen=True)
class Hardware:
    """Rates of one rank, reached and not promised."""

    flops: float  # per second, 2 per multiply-add
    bandwidth: float  # bytes per second that it receives in collectives
    source: str

    @staticmethod
    def assumed(config: RunConfig, nodes: int) -> Hardware:
        """Of no machine in particular."""
        return Hardware(_REACHED * _PEAK_FLOPS[config.precision], _INSIDE if nodes == 1 else _BETWEEN, UNMEASURED)

    @staticmethod
    def read(file: Path, config: RunConfig) -> Hardware:
        """What `sctrain plan --measure` wrote; UserError if it is something else, or of another precision."""
        try:
            found: dict[str, Any] = json.loads(file.read_text())
            rates = float(found["flops_per_second"]), float(found["bytes_per_second"])
            device, precision = str(found["device"]), found["precision"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no bench file ({error}): write one with `sctrain plan --measure`") from error
        if precision != config.precision or min(rates) <= 0:
            raise UserError(f"{file} was measured in {precision}, the run is in {config.precision}: measure it again")
        return Hardware(*rates, f"rates measured on {device}")


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step of all ranks."""

    seconds: float
    images_per_second: float
    sent: int  # bytes that a rank receives in collectives
    flops: int  # of a rank
    source: str


def speed(layout: Layout, counted: Counted, hardware: Hardware) -> Speed:
    """Computation and communication side by side: a step takes as long as the longer of the two."""
    parameters, others = layout.trained_parameters, (layout.world - 1) / layout.world
    if layout.sizes is None:  # one all-reduce
        sent = 2 * others * layout.bytes_each * parameters
    else:
        sent = layout.accumulation * others * layout.bytes_each * (counted.gathered + parameters)
    flops = layout.accumulation * counted.flops
    seconds = max(flops / hardware.flops, sent / hardware.bandwidth)
    return Speed(seconds, layout.config.batch.global_size / seconds, round(sent), flops, hardware.source)
