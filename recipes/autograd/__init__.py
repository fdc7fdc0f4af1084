"""Where bad gradients are born: a scalar reverse-mode differentiator, and points where a good value has a bad slope.

``python -m recipes.autograd`` prints expressions whose gradient is infinite or NaN although their value is harmless,
differentiated here and by torch, beside their cures from ``stability_callbacks.numerics``.

Example:
    >>> x = variable("x", 0.0)
    >>> y = 0 * sqrt(x)
    >>> y, backward(y)[x].item()
    (mul = 0, nan)
"""

from recipes.autograd._expression import SCALARS, TENSORS, Algebra, evaluate
from recipes.autograd._pitfalls import PITFALLS, Evaluation, Pitfall, by_scalars, by_torch
from recipes.autograd._scalar import (
    Operand,
    Scalar,
    absolute,
    acos,
    backward,
    exp,
    log,
    maximum,
    relu,
    sqrt,
    tanh,
    variable,
    where,
)
from recipes.autograd._tree import expression_tree

__all__ = [
    "PITFALLS",
    "SCALARS",
    "TENSORS",
    "Algebra",
    "Evaluation",
    "Operand",
    "Pitfall",
    "Scalar",
    "absolute",
    "acos",
    "backward",
    "by_scalars",
    "by_torch",
    "evaluate",
    "exp",
    "expression_tree",
    "log",
    "maximum",
    "relu",
    "sqrt",
    "tanh",
    "variable",
    "where",
]
