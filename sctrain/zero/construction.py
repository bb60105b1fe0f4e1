"""Networks that nobody ever holds whole: laid out from a blueprint, in ZeRO-3 partitioned parameter by parameter.

What comes out has zeros for weights; engines, once they have it, are filled with initial or stored values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sctrain.blueprint import Blueprint, owned
from sctrain.zero.internals import Partitioner


def lay_out(blueprint: Blueprint, config: dict[str, Any], device: torch.device, *, trained: bool) -> nn.Module:
    """The network of a blueprint for an engine of this DeepSpeed configuration. All ranks take part.

    Between parameters nothing of it takes memory but the shards; of a network that is to be `trained`, not even they,
    until its engine makes its own buffer for them.
    """
    network = blueprint.skeleton()
    for module in network.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    config = config if trained else frozen(config)
    in_bf16, partitioner = config["bf16"]["enabled"], None
    if stage(config) == 3:
        partitioner = Partitioner(config, torch.bfloat16 if in_bf16 else torch.float32, device)
    for _, owner, short, parameter in owned(network):
        shape = tuple(parameter.shape)
        owner._parameters[short] = (
            nn.Parameter(torch.zeros(shape, device=device))
            if partitioner is None
            else partitioner.blank(shape, postponed=trained)
        )
    return network


def frozen(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration for networks that are only evaluated.

    Without hpZ, which serves the second gathering of a training step: DeepSpeed would gather from copies within the
    machine that only training makes, and give what memory holds.
    """
    return config | {"zero_optimization": config["zero_optimization"] | {"zero_hpz_partition_size": 1}}


def stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return config["zero_optimization"]["stage"]


def partitioned(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration without parameters that stay whole, which would not see that their shards were set."""
    return config | {"zero_optimization": config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}
