"""Operations in the user's terms: their names, and why one made a non-finite value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stability_callbacks.diagnosis._domains import reason_in_domain
from stability_callbacks.diagnosis._reasons import Reason, overflow_from
from stability_callbacks.diagnosis._values import count, kinds, largest
from stability_callbacks.diagnosis._wider import reason_in_double

__all__ = ["Call", "leaves_memory_unset", "operation_name"]

_INNER_NAME = re.compile(r"^_*(?:native_|cudnn_|miopen_|mkldnn_|thnn_|fused_)*|(?:_legit.*|_with_update.*|_forward)$")
_ATTENTION = "scaled_dot_product_attention"

# Of these a finite argument gives an infinite result by its size alone.
_WITHOUT_POLES = {
    "add", "sub", "rsub", "mul", "square", "sum", "cumsum", "cumprod", "prod", "exp", "exp2", "expm1", "sinh", "cosh",
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "matmul", "linear", "convolution",
    "embedding_bag", "to", "copy", "lerp", "addcmul", "mean", "logcumsumexp", "batch_norm",
}  # fmt: skip

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
        func: The operation, in PyTorch's inner language.
        args: Positional arguments, with the values they had before the call; instead of tensors, their numbers.
        kwargs: Keyword arguments, in the same way.
        inputs: The numbers of all tensors among the arguments.
        outputs: The tensors it gave, and then those that it wrote to.
    """

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]

    @torch.no_grad()
    def reason(self) -> Reason:
        """Say why, as far as that is cheap to see."""
        name = operation_name(self.func).rstrip("_")
        return (
            reason_in_domain(name, self._arguments(), self.inputs, self.outputs)
            or _masked_rows(name, self.inputs, self.args, self._arguments())
            or _given_nan([*self.args, *self.kwargs.values()])
            or reason_in_double(self.func, self.args, self.kwargs, self.outputs)
            or _size(name, self.args, self.inputs, self.outputs)
        )

    def _arguments(self) -> dict[str, Any]:
        schema = getattr(self.func, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema else []
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def _masked_rows(name: str, inputs: Sequence[Tensor], args: Sequence[Any], arguments: dict[str, Any]) -> Reason:
    scores = inputs[0] if inputs else None
    if name == _ATTENTION:
        mask = arguments.get("attn_mask", arguments.get("attn_bias"))
        scores, dim = (mask, -1) if isinstance(mask, Tensor) and mask.is_floating_point() else (None, -1)
    elif "softmax" in name and len(args) > 1 and isinstance(args[1], int):
        dim = args[1]
    else:
        return Reason()
    if scores is None or dim >= max(scores.dim(), 1) or not scores.numel():
        return Reason()
    rows = count(scores.isneginf().all(dim=dim))
    words = f"{rows} row{' is' if rows == 1 else 's are'} masked entirely: all values are -inf"
    return Reason("masked_row", words) if rows else Reason()


def _given_nan(arguments: Sequence[Any]) -> Reason:
    given = any(isinstance(each, float) and math.isnan(each) for each in arguments)
    return Reason("nonfinite_input", "it was given the number nan") if given else Reason()


_WITH_INFINITY = {"add": "inf - inf", "sub": "inf - inf", "mul": "0 * inf", "div": "inf / inf"}


def _size(name: str, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    """What the magnitude of the inputs tells: numbers that are not finite themselves, an overflow, or nothing."""
    floats = [each for each in inputs if each.is_floating_point() or each.is_complex()]
    plain = [each for each in args if isinstance(each, float)]
    size = max([*map(largest, floats), *map(abs, plain)], default=0.0)
    if math.isnan(size):
        return Reason("nonfinite_input", "it was given NaN")
    if math.isinf(size):
        made_nan = any("NaN" in kinds(each) for each in outputs)
        known = name in _WITH_INFINITY and made_nan
        what = f": {_WITH_INFINITY[name]}" if known else ", such as inf - inf or 0 * inf"
        return Reason("nonfinite_input", f"arithmetic with infinity{what}")
    overflowed = next((each.dtype for each in outputs if kinds(each).keys() - {"NaN"}), None)
    if overflowed is not None:
        limit = torch.finfo(overflowed).max
        if name in _WITHOUT_POLES or size**2 >= limit:
            return overflow_from(size, overflowed)
    return Reason(None, f"the inputs are finite, the largest is {size:.6g}")
