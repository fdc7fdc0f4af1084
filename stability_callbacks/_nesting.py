"""Tensors in a nesting of containers, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["named_tensors"]


def named_tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in any nesting of mappings, lists, tuples (named ones too) and dataclasses.

    Args:
        tree: The nesting.
        name: Its name, which those of the tensors begin with.

    Yields:
        Name and tensor; keys, positions and fields in the name are set off by dots.

    Example:
        >>> import torch
        >>> [name for name, _ in named_tensors([torch.zeros(1), {"mask": torch.ones(1)}], "batch")]
        ['batch.0', 'batch.1.mask']
    """
    if isinstance(tree, Tensor):
        yield name, tree
    for key, value in _members(tree):
        yield from named_tensors(value, f"{name}.{key}")


def _members(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (list, tuple)):
        return zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name, None)) for field in fields(tree)]
    return ()
