"""Telling exceptions that bad numbers caused from all others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from stability_callbacks.diagnosis._source import SourceLine, is_users
from stability_callbacks.diagnosis._values import describe, kinds

__all__ = ["numeric_fault", "raising_line"]

# What torch and its friends say of numbers outside of an operation's domain; each has a test that provokes it.
_OF_NUMBERS = re.compile(
    r"to satisfy the constraint|within the support|found invalid values"  # torch.distributions
    r"|probability tensor contains either `inf`, `nan` or element < 0|invalid multinomial distribution"
    r"|all elements of (input|target|std)|expects all elements of std >= 0|Expected p_in >= 0"
    r"|returned nan values in its"  # detect_anomaly
    r"|not positive-definite|is singular|repeated eigenvalues|contained non-finite values|failed to converge"
    r"|contains NaN|must not contain infs or NaNs|NaN or inf|nan or inf",
    re.IGNORECASE,
)

# Errors that numbers do not cause, even where some of them are bad.
_OF_CODE = re.compile(r"\b(shapes?|sizes?|dtypes?|device|dimensions?|index|out of memory|CUDA|NCCL)\b", re.IGNORECASE)

_LINEAR_ALGEBRA: type[RuntimeError] = vars(torch.linalg)["LinAlgError"]
_KINDS = (ValueError, RuntimeError, ArithmeticError, AssertionError)
_NEVER = (torch.OutOfMemoryError, NotImplementedError, RecursionError)

# Tensors that are looked at in each frame.
_MOST_TENSORS = 64


def numeric_fault(error: BaseException, nearby: bool = True) -> str | None:
    """Why an exception is the work of numbers that are not finite or out of an operation's domain, if it can be told.

    Argument checks of ``torch.distributions``, a Cholesky factorization of a matrix that is not positive definite,
    ``multinomial`` of negative weights, ``binary_cross_entropy`` beyond [0, 1] and the like say so themselves. Another
    error counts if it does not speak of shapes, types and devices, and a tensor in a frame that it passed through holds
    NaN.

    Args:
        error: The exception, with its traceback.
        nearby: Whether a tensor nearby counts, too. Default True.

    Returns:
        The reason in words; None if it is an error of the code, or can't be told.

    Example:
        >>> try:
        ...     torch.distributions.Normal(torch.tensor(float("nan")), 1.0, validate_args=True)
        ... except ValueError as error:
        ...     numeric_fault(error).partition(" ")[0]
        'ValueError:'
        >>> numeric_fault(ValueError("too many values to unpack")) is None
        True
    """
    if not (isinstance(error, _KINDS) or type(error) is Exception) or isinstance(error, _NEVER):
        return None
    text = str(error).partition("\n")[0]
    said = f"{type(error).__name__}: {text}"
    if isinstance(error, (_LINEAR_ALGEBRA, ZeroDivisionError, FloatingPointError)) or _OF_NUMBERS.search(text):
        return said
    if not nearby or _OF_CODE.search(text):
        return None
    for name, tensor in _tensors(error.__traceback__):
        if "NaN" in kinds(tensor):  # infinities may be masks
            return f"{said} (`{name}` held {describe(tensor)})"
    return None


def raising_line(error: BaseException) -> SourceLine | None:
    """The innermost line of the user's code that an exception passed through; None if there is none."""
    lines = [(frame, line) for frame, line in _frames(error.__traceback__) if is_users(frame)]
    if not lines:
        return None
    frame, line = lines[-1]
    return SourceLine(frame.f_code.co_filename, line, frame.f_code.co_name)


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _tensors(traceback: TracebackType | None) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in the frames, the innermost frame first; those in tuples and lists too."""
    for frame, _ in reversed(list(_frames(traceback))):
        found: list[tuple[str, Tensor]] = []
        for name, value in list(frame.f_locals.items()):
            found += [(name, each) for each in _flat(value) if each.is_floating_point() and not each.is_meta]
        yield from found[:_MOST_TENSORS]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, (tuple, list)) else []
