"""Reverse-mode differentiation of scalars: each result remembers its operands and how a gradient passes back to them.

Every rule is the one of ``torch.autograd``, so that the same expressions go wrong at the same points: ``sqrt`` sends
back ``gradient / (2 * value)``, which is infinite at 0. Arithmetic follows IEEE 754 and never raises: ``1 / 0`` is inf,
``log(-1)`` and ``0 * inf`` are NaN.

Where a function has no derivative, the choices are torch's too: ``relu`` and ``abs`` have gradient 0 at 0, ``abs`` at
NaN too; ``maximum`` of equal operands gives each of them half, and of unordered ones (NaN) gives each the whole; a
power with exponent 0 has gradient 0 in its base, and one with base 0 and an exponent of at least 0 has derivative 0 in
the exponent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from numbers import Real
from typing import ClassVar, TypeAlias

import numpy as np

__all__ = [
    "Operand",
    "Scalar",
    "absolute",
    "acos",
    "backward",
    "exp",
    "log",
    "maximum",
    "relu",
    "sqrt",
    "tanh",
    "variable",
    "where",
]

Operand: TypeAlias = "Scalar | float"
Rule: TypeAlias = Callable[[np.float64], np.float64]  # from the gradient of a result to that of one operand

_ieee = np.errstate(all="ignore")
_ZERO = np.float64(0.0)


@dataclass(frozen=True, eq=False, repr=False)
class Scalar:
    """A number in a computation: a variable, a constant, or the result of an operation on others.

    Args:
        value: The number, in float64.
        name: Of the variable or of the operation; empty for a constant.
        requires_grad: Whether a variable is among the numbers it was computed from.
        operands: What the operation was applied to.
        rules: One for each operand.
        index: Position in the order of creation, in which operands always come before their results.

    Example:
        >>> x = variable("x", 3.0)
        >>> y = x * x + 1
        >>> y, backward(y)[x].item()
        (add = 10, 6.0)
    """

    value: np.float64
    name: str = ""
    requires_grad: bool = False
    operands: tuple[Scalar, ...] = ()
    rules: tuple[Rule, ...] = ()
    index: int = field(default_factory=count().__next__)

    __array_ufunc__: ClassVar[None] = None  # NumPy's numbers leave `number * scalar` to `__rmul__`

    def __repr__(self) -> str:
        return f"{self.name or 'constant'} = {self.value:.6g}"

    def __add__(self, other: Operand) -> Scalar:
        return _add(self, other)

    def __radd__(self, other: Operand) -> Scalar:
        return _add(other, self)

    def __sub__(self, other: Operand) -> Scalar:
        return _subtract(self, other)

    def __rsub__(self, other: Operand) -> Scalar:
        return _subtract(other, self)

    def __mul__(self, other: Operand) -> Scalar:
        return _multiply(self, other)

    def __rmul__(self, other: Operand) -> Scalar:
        return _multiply(other, self)

    def __truediv__(self, other: Operand) -> Scalar:
        return _divide(self, other)

    def __rtruediv__(self, other: Operand) -> Scalar:
        return _divide(other, self)

    def __pow__(self, other: Operand) -> Scalar:
        return _power(self, other)

    def __rpow__(self, other: Operand) -> Scalar:
        return _power(other, self)

    def __neg__(self) -> Scalar:
        return _result("neg", -self.value, (self, lambda gradient: -gradient))

    def __abs__(self) -> Scalar:
        return absolute(self)

    def __lt__(self, other: Operand) -> bool:
        return bool(self.value < constant(other).value)

    def __le__(self, other: Operand) -> bool:
        return bool(self.value <= constant(other).value)

    def __gt__(self, other: Operand) -> bool:
        return bool(self.value > constant(other).value)

    def __ge__(self, other: Operand) -> bool:
        return bool(self.value >= constant(other).value)


def variable(name: str, value: float) -> Scalar:
    """Make a number to differentiate by."""
    return Scalar(np.float64(value), name, requires_grad=True)


def constant(value: object) -> Scalar:
    """Make a number that needs no gradient; a scalar stays what it is.

    Raises:
        TypeError: If ``value`` is not a real number.
    """
    if isinstance(value, Scalar):
        return value
    if not isinstance(value, Real):
        raise TypeError(f"an operand must be a Scalar or a real number, got {value!r}")
    return Scalar(np.float64(value))


@_ieee
def backward(output: Scalar) -> dict[Scalar, np.float64]:
    """Differentiate ``output`` by everything that it was computed from.

    Results are visited from the last created to the first, as torch does. All that was computed from a number was
    created after it, so its gradient is complete when its turn comes; and nothing recurses, however deep the graph.

    Returns:
        The gradient at each variable and at each result that depends on one; constants have none.
    """
    if not output.requires_grad:
        return {}
    gradients = {output: np.float64(1.0)}
    latest_first = [(-output.index, output)]
    while latest_first:
        _, result = heappop(latest_first)
        for operand, rule in zip(result.operands, result.rules, strict=True):
            if not operand.requires_grad:
                continue
            gradient = rule(gradients[result])
            if operand in gradients:
                gradients[operand] += gradient
            else:
                gradients[operand] = gradient
                heappush(latest_first, (-operand.index, operand))
    return gradients


@_ieee
def exp(x: Operand) -> Scalar:
    x = constant(x)
    value = np.exp(x.value)
    return _result("exp", value, (x, lambda gradient: gradient * value))


@_ieee
def log(x: Operand) -> Scalar:
    x = constant(x)
    at = x.value
    return _result("log", np.log(at), (x, lambda gradient: gradient / at))


@_ieee
def sqrt(x: Operand) -> Scalar:
    x = constant(x)
    value = np.sqrt(x.value)
    return _result("sqrt", value, (x, lambda gradient: gradient / (2 * value)))


@_ieee
def tanh(x: Operand) -> Scalar:
    x = constant(x)
    value = np.tanh(x.value)
    return _result("tanh", value, (x, lambda gradient: gradient * (1 - value * value)))


@_ieee
def acos(x: Operand) -> Scalar:
    x = constant(x)
    at = x.value
    return _result("acos", np.arccos(at), (x, lambda gradient: gradient * -(1 / np.sqrt(1 - at * at))))


@_ieee
def absolute(x: Operand) -> Scalar:
    x = constant(x)
    at = x.value
    sign = float(at > 0) - float(at < 0)  # 0 for NaN, unlike NumPy's
    return _result("abs", np.abs(at), (x, lambda gradient: gradient * sign))


@_ieee
def relu(x: Operand) -> Scalar:
    x = constant(x)
    value = np.maximum(x.value, 0)
    return _result("relu", value, (x, lambda gradient: _ZERO if value <= 0 else gradient))


@_ieee
def maximum(x: Operand, y: Operand) -> Scalar:
    x, y = constant(x), constant(y)
    a, b = x.value, y.value

    def shared(gradient: np.float64) -> np.float64:
        return gradient / 2 if a == b else gradient

    return _result(
        "max",
        np.maximum(a, b),
        (x, lambda gradient: _ZERO if a < b else shared(gradient)),
        (y, lambda gradient: _ZERO if a > b else shared(gradient)),
    )


def where(condition: bool, x: Operand, y: Operand) -> Scalar:
    """Choose ``x`` or ``y``.

    Both are computed, and the one not chosen gets gradient 0 rather than none: its own operands then multiply that 0 by
    their derivatives, which may be infinite.
    """
    x, y = constant(x), constant(y)
    return _result(
        "where",
        x.value if condition else y.value,
        (x, lambda gradient: gradient if condition else _ZERO),
        (y, lambda gradient: _ZERO if condition else gradient),
    )


@_ieee
def _add(x: Operand, y: Operand) -> Scalar:
    x, y = constant(x), constant(y)
    return _result("add", x.value + y.value, (x, lambda gradient: gradient), (y, lambda gradient: gradient))


@_ieee
def _subtract(x: Operand, y: Operand) -> Scalar:
    x, y = constant(x), constant(y)
    return _result("sub", x.value - y.value, (x, lambda gradient: gradient), (y, lambda gradient: -gradient))


@_ieee
def _multiply(x: Operand, y: Operand) -> Scalar:
    x, y = constant(x), constant(y)
    a, b = x.value, y.value
    return _result("mul", a * b, (x, lambda gradient: gradient * b), (y, lambda gradient: gradient * a))


@_ieee
def _divide(x: Operand, y: Operand) -> Scalar:
    x, y = constant(x), constant(y)
    a, b = x.value, y.value
    return _result(
        "div",
        a / b,
        (x, lambda gradient: gradient / b),
        (y, lambda gradient: -gradient * ((a / b) / b)),  # b * b might overflow
    )


@_ieee
def _power(x: Operand, y: Operand) -> Scalar:
    x, y = constant(x), constant(y)
    base, exponent = x.value, y.value
    value = np.float_power(base, exponent)  # np.power takes the square root for an exponent of 0.5: NaN at -inf

    def to_base(gradient: np.float64) -> np.float64:
        slope: np.float64 = exponent * np.float_power(base, exponent - 1)
        return _ZERO if exponent == 0 else gradient * slope

    def to_exponent(gradient: np.float64) -> np.float64:
        slope: np.float64 = _ZERO if base == 0 and exponent >= 0 else value * np.log(base)
        return gradient * slope

    return _result("pow", value, (x, to_base), (y, to_exponent))


def _result(name: str, value: np.float64, *edges: tuple[Scalar, Rule]) -> Scalar:
    operands, rules = zip(*edges, strict=True)
    return Scalar(value, name, any(operand.requires_grad for operand in operands), operands, rules)
