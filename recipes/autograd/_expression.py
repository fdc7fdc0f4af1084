"""Formulas as text, computed with the numbers of this differentiator or of torch: one text, two independent gradients.

The text is parsed as Python and walked; only arithmetic, the listed functions and the given variables have a meaning,
and nothing is ever executed.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from recipes.autograd import _scalar
from recipes.autograd._scalar import Scalar
from stability_callbacks import numerics

__all__ = ["SCALARS", "TENSORS", "Algebra", "evaluate"]

T = TypeVar("T")

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CONSTANTS = {"inf": math.inf, "nan": math.nan, "pi": math.pi}


@dataclass(frozen=True)
class Algebra(Generic[T]):
    """The numbers that an expression is computed with; they know the operators themselves.

    Args:
        constant: Makes one that needs no gradient.
        functions: By the name they have in the text.
    """

    constant: Callable[[float], T]
    functions: Mapping[str, Callable[..., T]]


def _norm(*entries: Tensor) -> Tensor:
    return numerics.safe_norm(torch.stack(entries))


SCALARS: Algebra[Scalar] = Algebra(
    _scalar.constant,
    {
        "abs": _scalar.absolute,
        "acos": _scalar.acos,
        "exp": _scalar.exp,
        "log": _scalar.log,
        "max": _scalar.maximum,
        "relu": _scalar.relu,
        "sqrt": _scalar.sqrt,
        "tanh": _scalar.tanh,
        "where": _scalar.where,
    },
)
TENSORS: Algebra[Tensor] = Algebra(
    lambda value: torch.tensor(value, dtype=torch.float64),
    {
        "abs": torch.abs,
        "acos": torch.acos,
        "exp": torch.exp,
        "log": torch.log,
        "max": torch.maximum,
        "relu": torch.relu,
        "sqrt": torch.sqrt,
        "tanh": torch.tanh,
        "where": torch.where,
        "log1mexp": numerics.log1mexp,
        "safe_acos": numerics.safe_acos,
        "safe_div": numerics.safe_div,
        "safe_log": numerics.safe_log,
        "safe_norm": _norm,
        "safe_pow": numerics.safe_pow,
        "safe_sqrt": numerics.safe_sqrt,
    },
)


def evaluate(expression: str, variables: Mapping[str, T], algebra: Algebra[T]) -> T:
    """Compute an expression.

    Args:
        expression: Python arithmetic (``+ - * / **``), functions of the algebra, numbers, ``inf``, ``nan``, ``pi`` and
            variables; a comparison (``< <= > >=``) may stand as the first argument of ``where``.
        variables: By name.
        algebra: What to compute with.

    Returns:
        The result, which remembers how it was computed.

    Raises:
        ValueError: If the text is anything else.

    Example:
        >>> evaluate("2 * max(x, 1)", {"x": _scalar.variable("x", 3.0)}, SCALARS)
        mul = 6
    """
    try:
        return _Walk(variables, algebra).value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"expression is not valid arithmetic ({error.msg}), got {expression!r}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("expression is nested too deeply") from error


@dataclass(frozen=True)
class _Walk(Generic[T]):
    variables: Mapping[str, T]
    algebra: Algebra[T]

    def value(self, node: ast.expr) -> T:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self.algebra.constant(float(str(value)))  # by way of text, a huge integer is inf
            case ast.Name(id=name):
                return self.named(name)
            case ast.UnaryOp(op=ast.USub() as op, operand=operand):
                return cast(T, self.apply(op, operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return cast(T, self.apply(op, left, right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(name, arguments)
            case ast.Compare():
                raise ValueError(f"a comparison may only be the first argument of where, got {ast.unparse(node)!r}")
        raise ValueError(f"expression allows numbers, variables, + - * / ** and functions, got {ast.unparse(node)!r}")

    def named(self, name: str) -> T:
        if name in self.variables:
            return self.variables[name]
        if name in _CONSTANTS:
            return self.algebra.constant(_CONSTANTS[name])
        raise ValueError(f"expression uses {name!r}, which has no value; known are {_listed(self.variables)}")

    def apply(self, op: ast.AST, *operands: ast.expr) -> Any:
        return _OPERATORS[type(op)](*map(self.value, operands))

    def call(self, name: str, arguments: list[ast.expr]) -> T:
        if name not in self.algebra.functions:
            raise ValueError(f"function must be one of {_listed(self.algebra.functions)}, got {name!r}")
        values = [self.condition(argument) for argument in arguments[:1]] if name == "where" else []
        values += [self.value(argument) for argument in arguments[len(values) :]]
        try:
            return self.algebra.functions[name](*values)
        except TypeError as error:  # the number of arguments
            raise ValueError(f"wrong arguments of {name}: {error}") from error

    def condition(self, node: ast.expr) -> Any:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                return self.apply(op, left, right)
        raise ValueError(f"the first argument of where must be one comparison (< <= > >=), got {ast.unparse(node)!r}")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "none"
