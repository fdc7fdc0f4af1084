"""Why a node of the backward pass makes non-finite gradients of finite ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stability_callbacks.diagnosis._cures import plain_operation
from stability_callbacks.diagnosis._reasons import Reason, overflow_of, type_name
from stability_callbacks.diagnosis._values import is_finite, kinds, largest, numbers

__all__ = ["reason_of_gradient"]

# Which of the tensors that a node kept has an infinite or undefined slope at 0.
_STEEP_AT_ZERO = {
    **dict.fromkeys(("sqrt", "rsqrt", "reciprocal", "cbrt"), ("result",)),
    **dict.fromkeys(("log", "log2", "log10", "pow", "lgamma", "digamma", "polygamma"), ("self",)),
    **dict.fromkeys(("div", "addcdiv"), ("other", "tensor2")),
    **dict.fromkeys(("std", "stdmean"), ("result", "result0")),
    **dict.fromkeys(("norm", "linalgvectornorm", "cdist", "euclideandist", "hypot"), ("result",)),
    "xlogy": ("other",),
}
# The same at plus or minus 1.
_STEEP_AT_ONE = ("acos", "asin", "atanh", "erfinv", "acosh")

# Their gradients divide by the differences of what they kept under these names.
_DIFFERENCES = {
    **dict.fromkeys(("linalgsvd", "svd", "linalgsvdvals"), ("S",)),
    **dict.fromkeys(("linalgeigh", "linalgeig", "symeig"), ("eigenvalues", "L")),
}

# Sums of products: their gradients are finite unless they are too large for their type.
_PRODUCTS = {
    "mul", "addmm", "mm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution", "mkldnnconvolution",
    "cudnnconvolution", "linear", "exp", "exp2", "expm1", "sinh", "cosh", "sum", "mean", "add", "sub", "square",
    "tocopy", "cumsum", "matmul", "lerp", "addcmul", "embedding", "nllloss",
}  # fmt: skip


@torch.no_grad()
def reason_of_gradient(
    name: str, saved: Mapping[str, Tensor], given: Sequence[Tensor], made: Sequence[Tensor]
) -> Reason:
    """Say why, as far as the numbers tell.

    Args:
        name: The node's name.
        saved: What it kept of the forward pass, by name.
        given: The gradients that came in.
        made: Those that went out.
    """
    bad = [name for name, each in saved.items() if not is_finite(each)]
    if bad:
        return Reason("nonfinite_input", f"it works with `{bad[0]}`, which is not finite")
    plain = plain_operation(name)
    return (
        _steep(plain, saved) or _equal(plain, saved) or _deficient(plain, saved) or _overflow(plain, saved, given, made)
    )


def _steep(plain: str, saved: Mapping[str, Tensor]) -> Reason:
    values = {name: numbers(each) for name, each in saved.items()}
    if any(each in values and bool((values[each] == 0).any()) for each in _STEEP_AT_ZERO.get(plain, ())):
        return Reason("pole", "the slope is infinite or undefined at 0")
    own = values.get("self")
    if plain in _STEEP_AT_ONE and own is not None and bool((own.abs() == 1).any()):
        return Reason("pole", "the slope is infinite at the end of its domain")
    return Reason()


def _equal(plain: str, saved: Mapping[str, Tensor]) -> Reason:
    for name in _DIFFERENCES.get(plain, ()):
        values = saved.get(name)
        if values is None or not values.dim():
            continue
        found = numbers(values)
        distances = (found.unsqueeze(-1) - found.unsqueeze(-2)).abs()
        distances.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        scale = found.abs().amax(-1)[..., None, None]
        if bool((distances <= 4 * torch.finfo(distances.dtype).eps * scale).any()):
            what = "eigenvalues" if "eig" in plain else "singular values"
            return Reason("equal_values", f"two {what} are equal, and it divides by their difference")
        if "svd" in plain and bool((found == 0).any()):
            return Reason("singular", "a singular value is 0, and it divides by it")
    return Reason()


def _deficient(plain: str, saved: Mapping[str, Tensor]) -> Reason:
    """A QR decomposition of a matrix whose columns depend on each other: the gradient divides by the diagonal."""
    triangle = saved.get("R") if plain == "linalgqr" else None
    if triangle is None:
        return Reason()
    diagonal = numbers(triangle).diagonal(dim1=-2, dim2=-1).abs()
    tiny = torch.finfo(diagonal.dtype).eps * numbers(triangle).abs().amax()
    return Reason("singular", "the columns depend on each other") if bool((diagonal <= tiny).any()) else Reason()


def _overflow(plain: str, saved: Mapping[str, Tensor], given: Sequence[Tensor], made: Sequence[Tensor]) -> Reason:
    bad = [each for each in made if each.is_floating_point() and not is_finite(each)]
    if not bad:
        return Reason()
    limit, dtype = torch.finfo(bad[0].dtype).max, bad[0].dtype
    number = max((numbers(each).numel() for each in [*saved.values(), *given]), default=1)
    # A bound of all that can come about: with each factor twice, or under a fraction twice.
    bound = math.log(max(largest(each) for each in given) or 1.0) + math.log(number) if given else 0.0
    for each in saved.values():
        found = numbers(each).abs()
        nonzero = found[found > 0].double()
        if nonzero.numel():
            bound += 2 * max(abs(math.log(float(nonzero.max()))), abs(math.log(float(nonzero.min()))))
    infinite = any(kinds(each).keys() - {"NaN"} for each in bad)
    zeros = any(bool((numbers(each) == 0).any()) for each in saved.values())
    if infinite and (plain in _PRODUCTS or (bound >= math.log(limit) and not zeros)):
        return Reason(overflow_of(dtype), f"overflow: {type_name(dtype)} ends at {limit:.6g}")
    return Reason()
