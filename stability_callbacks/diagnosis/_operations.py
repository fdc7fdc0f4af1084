"""Operations in the user's terms: their names, and why one made a non-finite value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stability_callbacks.diagnosis._values import count, kinds, largest, numbers

__all__ = ["Call", "leaves_memory_unset", "operation_name"]

_INNER_NAME = re.compile(r"^_*(?:native_|cudnn_|miopen_|mkldnn_|thnn_|fused_)*|(?:_legit.*|_with_update.*|_forward)$")
_ATTENTION = "scaled_dot_product_attention"

# Where an operation has no finite value: which elements of its first input, and how they are called.
_OUTSIDE_DOMAIN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    **dict.fromkeys(("log", "log2", "log10", "rsqrt"), ("<= 0", lambda x: x <= 0)),
    "log1p": ("<= -1", lambda x: x <= -1),
    "sqrt": ("< 0", lambda x: x < 0),
    "reciprocal": ("that are 0", lambda x: x == 0),
    "logit": ("outside (0, 1)", lambda x: (x <= 0) | (x >= 1)),
    **dict.fromkeys(("acos", "asin"), ("outside [-1, 1]", lambda x: x.abs() > 1)),
    "atanh": ("outside (-1, 1)", lambda x: x.abs() >= 1),
    "acosh": ("< 1", lambda x: x < 1),
}

# These only allocate: what lies in the memory is nobody's result.
_ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


def operation_name(function: Any) -> str:
    """What a user calls an operation of PyTorch's inner language.

    Example:
        >>> operation_name(torch.ops.aten.log.default), operation_name(torch.ops.aten._softmax.default)
        ('log', 'softmax')
        >>> operation_name(torch.ops.aten.native_batch_norm.default)
        'batch_norm'
    """
    name = str(getattr(function, "__name__", function)).partition(".")[0]
    if _ATTENTION.removesuffix("_attention") in name:
        return _ATTENTION
    return {"to_copy": "to"}.get(inner := _INNER_NAME.sub("", name), inner)


def leaves_memory_unset(function: Any) -> bool:
    """Whether an operation only allocates memory, so that its output may hold anything."""
    return operation_name(function) in _ALLOCATIONS


class Call(NamedTuple):
    """An operation that was called, and gave a non-finite value.

    Args:
        name: The operation.
        args: Positional arguments, with the values they had before the call; instead of tensors, their numbers.
        inputs: The numbers of all tensors among the arguments.
        outputs: The tensors it gave or wrote to.
    """

    name: str
    args: Sequence[Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]

    @torch.no_grad()
    def reason(self) -> str:
        """Say why, as far as that is cheap to see."""
        name = self.name.rstrip("_")
        return (
            _outside_domain(name, self.inputs)
            or _division_by_zero(name, self.args)
            or _nothing_left(name, self.inputs, self.outputs)
            or _masked_rows(name, self.inputs, self.args)
            or _size(self.args, self.inputs, self.outputs)
        )


def _outside_domain(name: str, inputs: Sequence[Tensor]) -> str:
    label, is_outside = _OUTSIDE_DOMAIN.get(name, ("", None))
    if is_outside is None or not inputs or inputs[0].is_complex():
        return ""
    outside = count(is_outside(inputs[0]))
    return f"{name} of {outside} value{'' if outside == 1 else 's'} {label}" if outside else ""


def _division_by_zero(name: str, args: Sequence[Any]) -> str:
    if name not in ("div", "divide", "true_divide", "remainder", "fmod") or len(args) < 2:
        return ""
    divisor = torch.as_tensor(args[1])
    zeros = count(divisor == 0)
    return f"division by zero: {zeros} of {divisor.numel()} divisors" if zeros else ""


def _nothing_left(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    if inputs and not inputs[0].numel():
        return f"{name} over no elements"
    if name.startswith("nll_loss") and len(outputs) > 1 and not numbers(outputs[1]).any():
        return "the mean is over no targets: all of them are ignored, or have weight 0"
    return ""


def _masked_rows(name: str, inputs: Sequence[Tensor], args: Sequence[Any]) -> str:
    if "softmax" not in name or len(args) < 2 or not isinstance(args[1], int) or args[1] >= inputs[0].dim():
        return ""
    rows = count(inputs[0].isneginf().all(dim=args[1]))
    return f"{rows} row{' is' if rows == 1 else 's are'} masked entirely: all values are -inf" if rows else ""


def _size(args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """What the magnitude of the inputs tells: numbers that are not finite themselves, an overflow, or nothing."""
    floats = [each for each in inputs if each.is_floating_point() or each.is_complex()]
    plain = [each for each in args if isinstance(each, float)]
    if any(map(math.isnan, plain)):
        return "it was given the number nan"
    size = max([*map(largest, floats), *map(abs, plain)], default=0.0)
    if math.isinf(size):
        return "arithmetic with infinity, such as inf - inf or 0 * inf"
    overflowed = next((each.dtype for each in outputs if kinds(each).keys() - {"NaN"}), None)
    if overflowed is None:
        return f"the inputs are finite, the largest is {size:.6g}"
    name, limit = str(overflowed).removeprefix("torch."), torch.finfo(overflowed).max
    return f"overflow: the largest input is {size:.6g}, {name} ends at {limit:.6g}"
