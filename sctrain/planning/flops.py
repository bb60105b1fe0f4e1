"""Floating-point operations of matrix products, convolutions and attention, 2 per multiply-add.

By PyTorch's own formulas. Its FlopCounterMode is not used: it hooks into modules, which checkpointed blocks do not
bear, and it does not know the CPU's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# The CPU's attention takes the same arguments as the kernels whose formulas PyTorch has.
_SAME_AS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}


class Flops(TorchDispatchMode):
    """Counts into `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        formula = flop_registry.get(_SAME_AS.get(packet, packet))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
