"""What is in a nesting of containers, and where: one walk, and one way to write a place, for the whole package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, GetAttrKey, MappingKey, SequenceKey

__all__ = ["GetAttrKey", "MappingKey", "is_mapping_like", "members", "named_leaves", "named_tensors", "named_values"]

Members = list[tuple[Any, Any]]

_LEAVES = (Tensor, np.ndarray, np.generic, nn.Module, type, str, bytes, bytearray, memoryview, range, int, float)
# Some objects make new ones of their kind at each look into them, without end.
_MOST_MAPPING_LIKE = 8
_UNSET = object()


def named_tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in any nesting of containers, each with its place.

    Args:
        tree: The nesting, see :func:`named_leaves`.
        name: Its name, which those of the tensors begin with.

    Yields:
        Place and tensor, the place as one writes it in Python.

    Example:
        >>> [name for name, _ in named_tensors([torch.zeros(1), {"mask": torch.ones(1)}], "batch")]
        ['batch[0]', "batch[1]['mask']"]
    """
    return ((place, leaf) for place, leaf in named_leaves(tree, name) if isinstance(leaf, Tensor))


def named_values(tree: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The floating-point and complex values in any nesting, as tensors: NumPy's arrays and plain numbers too.

    Args:
        tree: The nesting, see :func:`named_leaves`.
        name: Its name. Default ``"batch"``.

    Yields:
        Place and value: a tensor as it is, all else as a copy.

    Example:
        >>> nested = {"x": torch.zeros(2), "more": [torch.ones(1), 3, 0.5]}
        >>> [place for place, _ in named_values(nested)]
        ["batch['x']", "batch['more'][0]", "batch['more'][2]"]
    """
    for place, leaf in named_leaves(tree, name):
        value = _as_tensor(np.asarray(leaf)) if isinstance(leaf, float | np.floating | np.ndarray) else leaf
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            yield place, value


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All that is no container in a nesting of containers, each with its place.

    Containers are what torch's pytree knows (lists, tuples, named tuples, dictionaries, deques, and what users have
    registered there), all other mappings and sequences, dataclasses, and mapping-like objects, see
    :func:`is_mapping_like`. Each is read once and never written to. A container inside of itself is a leaf there.

    Args:
        tree: The nesting.
        name: Its name.

    Yields:
        Place and leaf, the place as one writes it in Python.

    Example:
        >>> from collections import UserDict
        >>> list(named_leaves(UserDict(x=[1, None]), "batch"))
        [("batch['x'][0]", 1), ("batch['x'][1]", None)]
    """
    return _walk(tree, name, ())


def _walk(node: Any, place: str, around: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    inside = None if _is_leaf(node) or _is_endless(node, around) else members(node)
    if inside is None:
        yield place, node
        return
    around = (*around, node)
    for key, member in inside:
        if _is_leaf(member):  # most are: it saves a generator for each
            yield f"{place}{key}", member
        else:
            yield from _walk(member, f"{place}{key}", around)


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, _LEAVES)


def _is_endless(node: Any, around: tuple[Any, ...]) -> bool:
    if any(node is each for each in around):
        return True
    return is_mapping_like(node) and sum(map(is_mapping_like, around)) >= _MOST_MAPPING_LIKE


def members(node: Any) -> Members | None:
    """What is in a container, one level deep, each with its key in pytree's terms; None if it is no container.

    ``str(key)`` is the key as one writes it in Python. Of a dataclass these are the fields that are set, and what it
    was given besides.

    Example:
        >>> [(str(key), member) for key, member in members({"mask": 1, 5: 2})], members("text")
        ([("['mask']", 1), ('[5]', 2)], None)
    """
    if _is_leaf(node):
        return None
    registered = SUPPORTED_NODES.get(type(node))
    if registered is not None and registered.flatten_with_keys_fn is not None:
        return list(registered.flatten_with_keys_fn(node)[0])
    if isinstance(node, Mapping):
        return _keyed(MappingKey, node.items())
    if is_dataclass(node):
        return _keyed(GetAttrKey, _attributes(node).items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return _keyed(GetAttrKey, zip(node._fields, node, strict=True))
    if isinstance(node, Sequence):
        return _keyed(SequenceKey, enumerate(node))
    if registered is not None:
        return _keyed(SequenceKey, enumerate(registered.flatten_fn(node)[0]))
    return _keyed(MappingKey, _items(node)) if is_mapping_like(node) else None


def _attributes(node: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set, and what it was given besides."""
    found = {field.name: getattr(node, field.name, _UNSET) for field in fields(node)}
    there = {name: value for name, value in found.items() if value is not _UNSET}
    return {**there, **getattr(node, "__dict__", {})}


def is_mapping_like(node: Any) -> bool:
    """Whether an object is no container that Python knows but can be read as a mapping, as PyTorch Geometric's graphs.

    It has a ``to_dict()`` that needs no arguments, or ``keys()`` and ``[key]``. What turns into an array by itself, as
    tables do, is none.
    """
    kind: type = type(node)
    return not _is_leaf(node) and _reads_like_a_mapping(kind)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    """Keys and values of a mapping-like object, each read once."""
    # First the dictionary: `[key]` of a graph with several types of nodes makes a new type.
    if _is_method_without_arguments(type(node), "to_dict"):
        found = node.to_dict()
        return found.items() if isinstance(found, Mapping) else ()
    return [(key, node[key]) for key in node.keys()]  # noqa: SIM118  # it is no dictionary


@lru_cache(maxsize=256)
def _reads_like_a_mapping(kind: type) -> bool:
    if issubclass(kind, Mapping | Sequence) or is_dataclass(kind) or hasattr(kind, "__array__"):
        return False
    return _is_method_without_arguments(kind, "to_dict") or (
        _is_method_without_arguments(kind, "keys") and hasattr(kind, "__getitem__")
    )


def _is_method_without_arguments(kind: type, name: str) -> bool:
    method = inspect.getattr_static(kind, name, None)
    if not callable(method) or isinstance(method, staticmethod | classmethod):
        return False
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    except ValueError:  # written in C, and without a signature
        return True
    return True


def _keyed(key: Callable[[Any], Any], items: Iterable[tuple[Any, Any]]) -> Members:
    return [(key(name), member) for name, member in items]


def _as_tensor(array: NDArray[Any]) -> Tensor | None:
    """A copy of an array of floating-point or complex numbers, in a type that torch has; None of other arrays."""
    kind = array.dtype.kind
    if kind not in "fc":
        return None
    return torch.from_numpy(array.astype(f"={kind}{min(array.dtype.itemsize, 8 if kind == 'f' else 16)}"))
