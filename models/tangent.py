"""Forward-mode tangents that autograd does not record.

Continuous-time consistency models need dF/dt beside F in every step, and a gradient through F alone. A network is
written once, in ordinary PyTorch style; inside `forward_ad.dual_level()` its activations are dual tensors (value,
tangent). Built-in rules would make the tangent of every product with a parameter part of the autograd graph: about as
slow as a second pass, at several times the memory. `carried` splits each such operation instead: its value keeps the
stock kernel and graph, its tangent follows a rule evaluated under no_grad. Sums, reshapes and concatenations use
PyTorch's own rules, which record nothing when no incoming tangent requires a gradient. The result: one traversal,
parameters gathered once, shared dropout.
"""

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

Rule = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], Tensor]


def carried(value: Callable[..., Tensor], rule: Rule) -> Callable[..., Tensor]:
    """`value(*tensors)`, with its tangent given by `rule(result, primals, tangents)` and never recorded.

    Tangents of operands that carry none are None. Outside a dual level this is `value` itself.
    """

    def operation(*operands: Tensor) -> Tensor:
        pairs = [forward_ad.unpack_dual(operand) for operand in operands]
        primals, tangents = [pair.primal for pair in pairs], [pair.tangent for pair in pairs]
        result = value(*primals)
        if all(tangent is None for tangent in tangents):
            return result
        with torch.no_grad():
            tangent = rule(result, primals, tangents)
        return forward_ad.make_dual(result, tangent)

    return operation


def add_products(*products: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Sum of the products whose factors are both there: the product rule with absent (zero) tangents left out."""
    terms = [a * b for a, b in products if a is not None and b is not None]
    return sum(terms[1:], terms[0])


def value_and_tangent(network: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor], *constants: Tensor):
    """One traversal: outputs of `network(*primals, *constants)` with their graph, and the tangent of the first output.

    `network` returns a tuple of tensors. The tangent never requires a gradient.
    """
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True)]
        outputs = network(*duals, *constants)
        value, tangent = forward_ad.unpack_dual(outputs[0])
        others = [forward_ad.unpack_dual(output).primal for output in outputs[1:]]
    if tangent is None:
        tangent = torch.zeros_like(value)
    assert not tangent.requires_grad, "some operation recorded its tangent: give it a rule with `carried`"
    return (value, *others), tangent


def finite_difference(
    network: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor], *constants: Tensor, step: float = 1e-3
):
    """The same by central differences along the same direction, with the same dropout masks: the independent check.

    Three evaluations; its error is O(step^2) plus rounding of about 1e-7 / step in float32.
    """
    replay = _ReplayedRandomness(primals[0].device)
    outputs = network(*primals, *constants)
    moved = []
    with torch.no_grad():
        for sign in (1, -1):
            replay.rewind()
            shifted = (p + sign * step * t for p, t in zip(primals, tangents, strict=True))
            moved.append(network(*shifted, *constants)[0])
    return outputs, (moved[0] - moved[1]) / (2 * step)


class _ReplayedRandomness:
    """Lets several evaluations of a network draw the same dropout masks."""

    def __init__(self, device: torch.device):
        self._module = torch.cuda if device.type == "cuda" else torch.random
        self._state = self._module.get_rng_state()

    def rewind(self) -> None:
        self._module.set_rng_state(self._state)


TANGENT_ENGINES = {"single_pass": value_and_tangent, "finite_difference": finite_difference}
