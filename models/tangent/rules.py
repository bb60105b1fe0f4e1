"""How tangents pass PyTorch's functions. `t_` names a tangent.

Most rules need no formula of their own. A function that is linear is applied to the tangent too. And where the Jacobian
is symmetric - element by element, softmax, normalisations without weights - the derivative along a direction is the
gradient for that direction as cotangent: the stock *backward* kernel is the rule.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tangent.dual import Dual, paired, rule, tangent_of, tangent_rule, values
from models.tangent.precision import factors

_aten = torch.ops.aten


# --- Linear functions: reshapes, sums, resampling ------------------------------------------------------------------


@rule(
    *("reshape", "view", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze", "flatten", "unflatten"),
    *("expand", "expand_as", "repeat", "broadcast_to", "tile", "contiguous", "clone", "T", "mT", "t", "narrow"),
    *("chunk", "split", "unbind", "tensor_split", "__getitem__", "select", "index_select", "gather", "take_along_dim"),
    *("cat", "concat", "stack", "hstack", "vstack", "roll", "flip", "pad", "sum", "mean", "cumsum", "neg", "view_as"),
    *("interpolate", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle"),
)
def _linear_in_all(function: Callable, args: tuple, kwargs: dict) -> Any:
    out = function(*values(args), **values(kwargs))
    with torch.no_grad():
        t_out = function(*_directions(args), **_directions(kwargs))
    return paired(out, t_out)


def _directions(tree: Any) -> Any:
    """Duals become their tangents, other floating tensors zero; indices and sizes stay."""
    if isinstance(tree, Dual):
        return tree.tangent
    if isinstance(tree, Tensor):
        return torch.zeros_like(tree) if tree.is_floating_point() else tree
    if isinstance(tree, tuple | list):
        return type(tree)([_directions(item) for item in tree])
    if isinstance(tree, dict):
        return {key: _directions(item) for key, item in tree.items()}
    return tree


@tangent_rule("to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu")
def _converted(out: Tensor, x: Dual, *_, **__) -> Tensor:
    return x.tangent.to(out.device)  # `tangent_rule` sees to the dtype


# --- Sums ----------------------------------------------------------------------------------------------------------


@tangent_rule("add", "__add__", "__radd__")
def _add(out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    return _total(out, (tangent_of(a), 1), (tangent_of(b), alpha))


@tangent_rule("sub", "subtract", "__sub__")
def _sub(out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    return _total(out, (tangent_of(a), 1), (tangent_of(b), -alpha))


@tangent_rule("rsub", "__rsub__")
def _rsub(out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    return _total(out, (tangent_of(a), -alpha), (tangent_of(b), 1))


def _total(out: Tensor, *terms: tuple[Tensor | None, float]) -> Tensor:
    present = [(t, factor) for t, factor in terms if t is not None]
    if len(present) == 2:
        (a, one), (b, alpha) = present
        return torch.add(a, b, alpha=alpha) if one == 1 else torch.sub(b, a, alpha=-one)
    t, factor = present[0]
    return (t if factor == 1 else factor * t).expand(out.shape)


# --- Products ------------------------------------------------------------------------------------------------------


@tangent_rule("mul", "multiply", "__mul__", "__rmul__")
def _mul(out: Tensor, a: Any, b: Any) -> Tensor:
    (a, b), (t_a, t_b) = values((a, b)), (tangent_of(a), tangent_of(b))
    if t_a is None or t_b is None:
        return a * t_b if t_a is None else t_a * b  # pyright: ignore[reportOptionalOperand]
    return torch.addcmul(t_a * b, a, t_b)


@tangent_rule("addcmul")
def _addcmul(out: Tensor, base: Any, a: Any, b: Any, *, value: float = 1) -> Tensor:
    t_out = tangent_of(base)
    for one, other in ((tangent_of(a), values(b)), (tangent_of(b), values(a))):
        if one is not None:
            t_out = value * one * other if t_out is None else torch.addcmul(t_out, one, other, value=value)
    assert t_out is not None
    return t_out.expand(out.shape)


@tangent_rule("div", "true_divide", "__div__", "__truediv__")
def _div(out: Tensor, a: Any, b: Any, *, rounding_mode: None = None) -> Tensor:
    assert rounding_mode is None, "a rounded quotient has no tangent"
    (a, b), (t_a, t_b) = values((a, b)), (tangent_of(a), tangent_of(b))
    if t_b is None:
        return t_a / b  # pyright: ignore[reportOptionalOperand]
    return (-out * t_b if t_a is None else torch.addcmul(t_a, out, t_b, value=-1)) / b


@tangent_rule("matmul", "__matmul__", "__rmatmul__", "bmm", "mm")
def _matmul(out: Tensor, a: Any, b: Any) -> Tensor:
    terms = []
    if isinstance(a, Dual):
        terms.append(torch.matmul(*factors(a.tangent, values(b))))
    if isinstance(b, Dual):
        t_b, a = factors(b.tangent, values(a))
        terms.append(torch.matmul(a, t_b))
    return sum(terms[1:], terms[0])


@tangent_rule("linear")
def _linear(out: Tensor, input: Any, weight: Any, bias: Any = None) -> Tensor:
    _parameters_are_constants(weight, bias)
    return F.linear(*factors(input.tangent, weight))


def _convolution_rule(function: Callable) -> Callable:
    def t_convolution(out: Tensor, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        _parameters_are_constants(weight, bias)
        return function(*factors(input.tangent, weight), None, *args, **kwargs)

    return t_convolution


for _function in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    tangent_rule(_function.__name__)(_convolution_rule(_function))


def _parameters_are_constants(*parameters: Any) -> None:
    assert not any(isinstance(parameter, Dual) for parameter in parameters), "the direction is in x and t alone"


# --- Symmetric Jacobians: the tangent is the stock gradient ----------------------------------------------------------


def _gradient_as_tangent(gradient: Callable[..., Tensor], *, of_result: bool) -> Callable[..., Tensor]:
    """The rule of an element-wise function whose `gradient(cotangent, x or result, **options)` is given."""

    def t_function(out: Tensor, x: Dual, *, inplace: bool = False, **options: Any) -> Tensor:
        return gradient(*factors(x.tangent, out if of_result else x.value), **options)

    return t_function


tangent_rule("silu")(_gradient_as_tangent(_aten.silu_backward, of_result=False))
tangent_rule("gelu")(_gradient_as_tangent(_aten.gelu_backward, of_result=False))
tangent_rule("sigmoid")(_gradient_as_tangent(_aten.sigmoid_backward, of_result=True))
tangent_rule("tanh")(_gradient_as_tangent(_aten.tanh_backward, of_result=True))


@tangent_rule("sin")
def _sin(out: Tensor, x: Dual) -> Tensor:
    return x.tangent * x.value.cos()


@tangent_rule("cos")
def _cos(out: Tensor, x: Dual) -> Tensor:
    return -x.tangent * x.value.sin()


@tangent_rule("exp")
def _exp(out: Tensor, x: Dual) -> Tensor:
    return x.tangent * out


@tangent_rule("clamp", "clip")
def _clamp(out: Tensor, x: Dual, *_, **__) -> Tensor:
    return x.tangent * (out == x.value)


@tangent_rule("softmax")
def _softmax(out: Tensor, x: Dual, dim: int, *_, **__) -> Tensor:
    wide = out.to(x.tangent.dtype)
    return _aten._softmax_backward_data(x.tangent, wide, dim, wide.dtype)


@tangent_rule("layer_norm")
def _layer_norm(out, x, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    wide = x.value.to(x.tangent.dtype)
    _, mean, rstd = _aten.native_layer_norm(wide, normalized_shape, None, None, eps)
    mask = [True, False, False]
    t_out = _aten.native_layer_norm_backward(x.tangent, wide, normalized_shape, mean, rstd, None, None, mask)[0]
    return t_out if weight is None else t_out * weight


@tangent_rule("group_norm")
def _group_norm(out, x, num_groups, weight=None, bias=None, eps=1e-5, *_):
    wide, t_x = x.value.to(x.tangent.dtype).contiguous(), x.tangent.contiguous()
    B, C = wide.shape[:2]
    spatial = wide[0, 0].numel()
    _, mean, rstd = _aten.native_group_norm(wide, None, None, B, C, spatial, num_groups, eps)
    mask = [True, False, False]
    t_out = _aten.native_group_norm_backward(t_x, wide, mean, rstd, None, B, C, spatial, num_groups, mask)[0]
    return t_out if weight is None else t_out * weight.reshape(1, C, *(1,) * (wide.ndim - 2))


# --- Randomness ----------------------------------------------------------------------------------------------------


@rule("dropout", "dropout1d", "dropout2d", "dropout3d")
def _dropout(function: Callable, args: tuple, kwargs: dict) -> Dual:
    """The mask that the plain function would draw, for value and tangent."""
    return _masked(function, *args, **kwargs)


def _masked(function: Callable, x: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    if p == 0 or not training:
        return x
    with torch.no_grad():
        mask = function(torch.ones_like(x.value), p, training)
        t_out = x.tangent * mask
    return Dual(x.value * mask, t_out)
