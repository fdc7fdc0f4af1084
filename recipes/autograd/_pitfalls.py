"""Expressions whose gradient is not finite where their value mostly is, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from recipes.autograd._expression import SCALARS, TENSORS, evaluate
from recipes.autograd._scalar import backward, variable

__all__ = ["PITFALLS", "Evaluation", "Pitfall", "by_scalars", "by_torch"]


@dataclass(frozen=True)
class Pitfall:
    """An expression, the point where it goes wrong, why, and its cure."""

    name: str
    expression: str
    at: Mapping[str, float]
    cure: str
    why: str


@dataclass(frozen=True)
class Evaluation:
    """A value, and its gradient by each variable."""

    value: float
    gradient: Mapping[str, float]


def by_scalars(expression: str, at: Mapping[str, float]) -> Evaluation:
    """Evaluate and differentiate an expression with this recipe's differentiator."""
    variables = {name: variable(name, value) for name, value in at.items()}
    output = evaluate(expression, variables, SCALARS)
    gradients = backward(output)
    return Evaluation(float(output.value), {name: float(gradients.get(x, 0.0)) for name, x in variables.items()})


def by_torch(expression: str, at: Mapping[str, float]) -> Evaluation:
    """Evaluate and differentiate an expression with torch, in float64."""
    variables = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in at.items()}
    output = evaluate(expression, variables, TENSORS)
    if not output.requires_grad:
        return Evaluation(output.item(), dict.fromkeys(variables, 0.0))
    gradients = torch.autograd.grad(output, list(variables.values()), allow_unused=True, materialize_grads=True)
    return Evaluation(
        output.item(), {name: gradient.item() for name, gradient in zip(variables, gradients, strict=True)}
    )


PITFALLS = {
    pitfall.name: pitfall
    for pitfall in (
        Pitfall(
            "sqrt",
            "sqrt(x)",
            {"x": 0.0},
            "safe_sqrt(x)",
            "The slope 1 / (2 sqrt(x)) is infinite at 0: a standard deviation of equal numbers.",
        ),
        Pitfall(
            "zero-weight",
            "0 * sqrt(x)",
            {"x": 0.0},
            "0 * safe_sqrt(x)",
            "A weight of 0 does not switch a loss term off: 0 times its infinite slope is NaN.",
        ),
        Pitfall(
            "where",
            "where(x > 0, x * log(x), 0)",
            {"x": 0.0},
            "x * safe_log(x)",
            "The mask hides the value only: the branch not taken gets gradient 0, and 0 * log(0) is NaN.",
        ),
        Pitfall(
            "log",
            "log(x)",
            {"x": 1e-310},
            "safe_log(x)",
            "The slope 1 / x overflows near 0, while the value is only -714.",
        ),
        Pitfall(
            "exp",
            "1 / (1 + exp(-x))",
            {"x": -1000.0},
            "(1 + tanh(x / 2)) / 2",
            "The sigmoid is 0 as 1 / inf, its slope 0 * inf: write it so that no exponential overflows.",
        ),
        Pitfall(
            "abs",
            "sqrt(x ** 2)",
            {"x": 0.0},
            "safe_norm(x)",
            "|x| has no slope at 0: abs(x) chooses 0, but its formula gives inf * 0.",
        ),
        Pitfall(
            "norm",
            "sqrt(x ** 2 + y ** 2)",
            {"x": 0.0, "y": 0.0},
            "safe_norm(x, y)",
            "The norm of a zero vector, such as padding or the distance of a point to itself: inf * 0 again.",
        ),
        Pitfall(
            "div",
            "where(y > 0, x / y, 0)",
            {"x": 1.0, "y": 0.0},
            "safe_div(x, y)",
            "A mean over an empty mask: the masked quotient sends 0 / 0 and 0 * inf back.",
        ),
        Pitfall(
            "pow",
            "x ** 0.5",
            {"x": 0.0},
            "safe_pow(x, 0.5)",
            "An exponent below 1 makes the slope 0.5 * x ** -0.5 infinite at 0.",
        ),
        Pitfall(
            "acos",
            "acos(x)",
            {"x": 1.0},
            "safe_acos(x)",
            "The angle between parallel vectors: its slope -1 / sqrt(1 - x ** 2) is infinite.",
        ),
        Pitfall(
            "log1mexp",
            "log(1 - exp(-x))",
            {"x": 1e-17},
            "log1mexp(x)",
            "exp(-x) rounds to 1, which leaves log(0): the value is lost, not only the slope.",
        ),
    )
}
