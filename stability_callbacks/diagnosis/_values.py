"""What is wrong with the numbers in a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stability_callbacks.gradient_pass import local_values, tensor_norms

__all__ = ["count", "describe", "is_finite", "kinds", "largest", "numbers", "tensors_in"]


@torch.no_grad()
def numbers(tensor: Tensor) -> Tensor:
    """The numbers that this process holds, dense and of a type that has arithmetic."""
    values = tensor.values() if tensor.is_nested else local_values(tensor)
    return values.float() if values.dtype.itemsize == 1 and values.is_floating_point() else values


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether no element that this process holds is NaN or infinite; true for integers and tensors without values."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return math.isfinite(largest(tensor))


@torch.no_grad()
def largest(tensor: Tensor) -> float:
    """Largest magnitude; NaN if there is a NaN."""
    return float(tensor_norms([numbers(tensor)], math.inf))


@torch.no_grad()
def describe(tensor: Tensor) -> str:
    """Count the non-finite elements.

    Example:
        >>> describe(torch.tensor([1.0, float("nan"), float("-inf"), 0.0]))
        '1 NaN and 1 -inf in 4 values'
    """
    found = [f"{number} {kind}" for kind, number in kinds(tensor).items()]
    size = numbers(tensor).numel()
    return f"{' and '.join(found) or 'none non-finite'} in {size} value{'' if size == 1 else 's'}"


@torch.no_grad()
def kinds(tensor: Tensor) -> dict[str, int]:
    """Which kinds of non-finite values a tensor holds, and how many; of a complex one in its parts."""
    values = numbers(tensor)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    counts = {"NaN": count(values.isnan()), "inf": count(values.isposinf()), "-inf": count(values.isneginf())}
    return {kind: number for kind, number in counts.items() if number}


def count(flags: Tensor) -> int:
    """Number of true elements."""
    return int(flags.sum())


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a tree, in torch's terms: an operation's arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
