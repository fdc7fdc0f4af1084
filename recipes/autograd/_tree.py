"""An expression as a tree on the screen, a value and a gradient at each node."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.text import Text
from rich.tree import Tree

from recipes.autograd._scalar import Scalar

__all__ = ["expression_tree", "number"]


def expression_tree(output: Scalar, gradients: Mapping[Scalar, np.float64]) -> Tree:
    """Draw what ``output`` was computed from.

    A result that is used several times is drawn in full at its first use only; the gradient shown is the sum over all.

    Args:
        output: The root.
        gradients: From :func:`recipes.autograd.backward`.

    Returns:
        For a rich console to print.
    """
    forest = Tree("", hide_root=True)
    drawn: set[Scalar] = set()
    pending = [(forest, output)]
    while pending:
        parent, node = pending.pop()
        branch = parent.add(_label(node, gradients, again=node in drawn))
        if node.operands and node not in drawn:
            drawn.add(node)
            pending += [(branch, operand) for operand in reversed(node.operands)]
    return forest.children[0]


def number(value: float) -> Text:
    """Format a number in short, in red if it is not finite."""
    return Text(f"{value:.6g}", style="" if np.isfinite(value) else "bold red")


def _label(node: Scalar, gradients: Mapping[Scalar, np.float64], again: bool) -> Text:
    label = Text()
    if node.name:
        label.append(node.name, style="bold" if node.operands else "bold cyan").append(" = ")
    label.append_text(number(node.value))
    if node in gradients:
        label.append("   gradient ", style="dim").append_text(number(gradients[node]))
    if again:
        label.append("   (see above)", style="dim")
    return label
