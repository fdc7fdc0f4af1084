"""Where operations have no finite value, whatever the precision: poles, and what lies outside of a domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stability_callbacks.diagnosis._reasons import Reason
from stability_callbacks.diagnosis._values import count, numbers

__all__ = ["reason_in_domain"]

Arguments = Mapping[str, Any]
"""The arguments of a call by the names that its schema gives them, with numbers in the place of tensors."""


class _Outside(NamedTuple):
    """Which numbers an operation of one variable has no finite value for.

    Args:
        label: How they are called.
        outside: Which they are.
        pole: Those among them near which the value grows without bound.
    """

    label: str
    outside: Callable[[Tensor], Tensor]
    pole: Callable[[Tensor], Tensor]


def _never(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def _is_pole_of_gamma(x: Tensor) -> Tensor:
    return (x <= 0) & (x == x.floor())


_POSITIVE = _Outside("<= 0", lambda x: x <= 0, lambda x: x == 0)
_UNIT = _Outside("outside (0, 1)", lambda x: (x <= 0) | (x >= 1), lambda x: (x == 0) | (x == 1))
_OPEN = _Outside("outside (-1, 1)", lambda x: x.abs() >= 1, lambda x: x.abs() == 1)
_GAMMA = _Outside("at 0 or negative integers", _is_pole_of_gamma, _is_pole_of_gamma)
_BESSEL = ("bessel_y0", "bessel_y1", "modified_bessel_k0", "modified_bessel_k1")
_SCALED_BESSEL = ("scaled_modified_bessel_k0", "scaled_modified_bessel_k1")

_OF_ONE: dict[str, _Outside] = {
    **dict.fromkeys(("log", "log2", "log10", "rsqrt"), _POSITIVE),
    **dict.fromkeys((f"special_{name}" for name in (*_BESSEL, *_SCALED_BESSEL)), _POSITIVE),
    "log1p": _Outside("<= -1", lambda x: x <= -1, lambda x: x == -1),
    "sqrt": _Outside("< 0", lambda x: x < 0, _never),
    "special_entr": _Outside("< 0", lambda x: x < 0, _never),
    "reciprocal": _Outside("that are 0", lambda x: x == 0, lambda x: x == 0),
    **dict.fromkeys(("logit", "special_ndtri"), _UNIT),
    **dict.fromkeys(("acos", "asin"), _Outside("outside [-1, 1]", lambda x: x.abs() > 1, _never)),
    **dict.fromkeys(("atanh", "erfinv"), _OPEN),
    "acosh": _Outside("< 1", lambda x: x < 1, _never),
    **dict.fromkeys(("lgamma", "digamma", "polygamma"), _GAMMA),
}


def reason_in_domain(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    """Why a known operation has no finite value for the numbers it was given; empty if that is not why.

    Args:
        name: The operation, see :func:`operation_name`, without an underscore at its end.
        arguments: What it was given, by name.
        inputs: The numbers of all tensors that it was given.
        outputs: What it gave.
    """
    judges = (_of_one, _power, _division, _log_of_second, _too_few, _empty, _alignment, _singular, _norm)
    return next(filter(None, (judge(name, arguments, inputs, outputs) for judge in judges)), Reason())


def _of_one(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    known = _OF_ONE.get(name)
    if known is None or not inputs or inputs[0].is_complex():
        return Reason()
    outside, poles = count(known.outside(inputs[0])), count(known.pole(inputs[0]))
    words = f"{name} of {outside} value{'' if outside == 1 else 's'} {known.label}"
    return Reason("pole" if poles == outside else "domain", words) if outside else Reason()


def _power(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    if name != "pow":
        return Reason()
    base, exponent = _number(arguments, "self"), _number(arguments, "exponent")
    if base is None or exponent is None or base.is_complex() or exponent.is_complex():
        return Reason()
    roots = count((base < 0) & base.isfinite() & exponent.isfinite() & (exponent != exponent.floor()))
    if roots:
        return Reason("domain", f"pow of {_values(roots, 'negative')} to a power that is no integer")
    poles = count((base == 0) & (exponent < 0))
    return Reason("pole", f"pow of {_values(poles)} that {_are(poles)} 0, to a negative power") if poles else Reason()


_DIVIDED = {
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide", "remainder", "fmod"), ("self", "other")),
    "addcdiv": ("tensor1", "tensor2"),
}


def _division(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    if name not in _DIVIDED:
        return Reason()
    dividend, divisor = (_number(arguments, each) for each in _DIVIDED[name])
    if dividend is None or divisor is None:
        return Reason()
    zeros = divisor == 0
    if not zeros.any():
        return Reason()
    undefined = name in ("remainder", "fmod") or not ((dividend != 0) & zeros).any()
    words = f"division by zero: {count(zeros)} of {divisor.numel()} divisors"
    return Reason("domain" if undefined else "pole", words)


_LOGS = {"xlogy": 0, "special_xlogy": 0, "special_xlog1py": -1}


def _log_of_second(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    if name not in _LOGS:
        return Reason()
    factor, value = _number(arguments, "self"), _number(arguments, "other")
    if factor is None or value is None:
        return Reason()
    end = _LOGS[name]
    below, at_end = count((value < end) & (factor != 0)), count((value == end) & (factor != 0))
    if not below + at_end:
        return Reason()
    return Reason("domain" if below else "pole", f"{name} takes the log of {_values(below + at_end)} <= {end}")


def _too_few(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    if name not in ("std", "var", "std_mean", "var_mean") or not inputs:
        return Reason()
    given, dims = arguments.get("correction"), arguments.get("dim")
    correction = 1 if given is None else given
    sizes = inputs[0].shape
    if isinstance(dims, int):
        dims = [dims]
    number = math.prod(sizes[each] for each in dims) if dims and sizes else math.prod(sizes)
    if not number or number > correction:
        return Reason()
    elements = f"{number} element" + ("" if number == 1 else "s")
    return Reason("one_element", f"{name} over {elements} with correction {correction:g} divides by zero")


def _empty(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    if inputs and not inputs[0].numel():
        return Reason("empty", f"{name} over no elements")
    if name.startswith("nll_loss") and len(outputs) > 1 and not numbers(outputs[1]).any():
        return Reason("empty", "the mean is over no targets: all of them are ignored, or have weight 0")
    return Reason()


def _alignment(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    """CTC: each label takes a frame, and between two that are alike there is a blank."""
    if name != "ctc_loss":
        return Reason()
    targets, frames, lengths = (
        torch.as_tensor(arguments[each]).cpu() for each in ("targets", "input_lengths", "target_lengths")
    )
    starts = lengths.flatten().cumsum(0) - lengths.flatten()
    late = 0
    for index, (start, length, there) in enumerate(
        zip(starts.tolist(), lengths.flatten().tolist(), frames.flatten().tolist(), strict=True)
    ):
        labels = targets[index, :length] if targets.dim() == 2 else targets[start : start + length]
        late += length + count(labels[1:] == labels[:-1]) > there
    if not late:
        return Reason()
    words = f"{late} of {len(starts)} targets {_are(late)} longer than the frames allow"
    return Reason("alignment", f"{words} (a label takes a frame, and two alike in a row a blank between them)")


_OF_MATRICES = ("slogdet", "inv_ex", "inv", "inverse", "solve_ex", "lu_solve", "solve_triangular", "triangular_solve")


def _singular(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    if name.removeprefix("linalg_") not in _OF_MATRICES:
        return Reason()
    for each in inputs:
        if each.dim() < 2 or each.shape[-1] != each.shape[-2] or not each.isfinite().all():
            continue
        wide = each.detach().cpu().to(torch.promote_types(each.dtype, torch.double))
        singular = count(torch.linalg.matrix_rank(wide) < each.shape[-1])
        if singular:
            number = math.prod(each.shape[:-2])
            return Reason("singular", f"{singular} of {number} {_matrices(number)} {_are(singular)} singular")
    return Reason()


def _norm(name: str, arguments: Arguments, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Reason:
    """A normalization without a floor under its divisor."""
    if name not in ("layer_norm", "group_norm", "batch_norm", "rms_norm") or arguments.get("eps") != 0:
        return Reason()
    if not all(each.isfinite().all() for each in inputs):
        return Reason()
    size = "root mean square" if name == "rms_norm" else "standard deviation"
    return Reason("domain", f"{name} divides 0 by a {size} of 0, since its eps is 0")


def _number(arguments: Arguments, name: str) -> Tensor | None:
    value = arguments.get(name)
    return value if isinstance(value, Tensor) else torch.as_tensor(value) if isinstance(value, int | float) else None


def _values(number: int, kind: str = "") -> str:
    return f"{number} {kind}{' ' if kind else ''}value{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _matrices(number: int) -> str:
    return "matrix" if number == 1 else "matrices"
