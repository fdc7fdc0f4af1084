"""Batches and states as plain structures that ``torch.load(weights_only=True)`` takes: no file can run code.

Tensors, numbers, strings, lists, tuples and dictionaries stay what they are. Everything else is a dictionary with the
key ``__stored__``, which says of what.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass, make_dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stability_callbacks._nesting import GetAttrKey, MappingKey, members

__all__ = ["Unsaved", "from_storable", "to_storable"]

_TAG = "__stored__"
_KEPT = (bool, torch.Size, torch.dtype, torch.device)
# The base class's own conversion: of a member of an enumeration, `str` would give the name.
_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int),
    (float, float),
    (complex, complex),
    (str, str.__str__),
    (PurePath, str),
    (range, list),
)


@dataclass(frozen=True)
class Unsaved:
    """Stands in a bundle for an object that was not stored, since only code of its own could make it again.

    Attributes:
        class_name: The object's class, as ``"package.module:Class"``.
    """

    class_name: str


def to_storable(value: Any) -> tuple[Any, list[str]]:
    """Turn a batch or state, however nested, into a plain structure.

    Tensors come to the host, without their graph and without the rest of a larger storage. Those of subclasses become
    plain ones, sharded ones the local shard. Mappings become dictionaries, other sequences lists, members of
    enumerations that are numbers or strings those, paths strings. Named tuples and dataclasses are taken apart into
    their fields; objects that can be read as mappings, such as the graphs of PyTorch Geometric, into their items. What
    is none of these is left out, and what holds itself is where it comes again.

    Args:
        value: Anything.

    Returns:
        The structure, and where in the value something was left out.

    Example:
        >>> to_storable([{"x": torch.ones(1), "image": object()}])
        ([{'x': tensor([1.]), 'image': {'__stored__': 'unsaved', 'class': 'builtins:object'}}], ["[0]['image']"])
    """
    taken = _Taken()
    return _take(value, "", taken), taken.left_out


def from_storable(structure: Any, allow_classes: bool = False) -> Any:
    """Put together again what :func:`to_storable` took apart.

    Args:
        structure: The structure.
        allow_classes: Whether to import the classes of named tuples and dataclasses, which runs the code of modules
            that the file names; their constructors are not called. Otherwise, and where a class is not found, they are
            of look-alike classes made here, with the same fields but no methods. Classes of torch are always imported.
            Objects that were read as mappings always are look-alikes, with ``value.key`` and ``value["key"]``.

    Returns:
        The value, with :class:`Unsaved` where something was left out.

    Raises:
        ValueError: If the structure is none that :func:`to_storable` makes.
    """
    if isinstance(structure, dict):
        if _TAG not in structure:
            return {key: from_storable(item, allow_classes) for key, item in structure.items()}
        try:
            return _put_together(structure, allow_classes)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a stored {structure[_TAG]!r} is not as it should be: {error!r}") from error
    if type(structure) in (list, tuple):
        return type(structure)(from_storable(item, allow_classes) for item in structure)
    return structure


class _LookAlike(dict[Any, Any]):
    """Stands for an object that was read as a mapping: ``value.key`` and ``value["key"]`` work, no methods do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"this {type(self).__name__} has no {name!r}: only its items were kept") from error


class _Taken:
    """What one pass over a value remembers: what was left out, and copies of tensors, which may share memory."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.copies: dict[tuple[Any, ...], Tensor] = {}
        self.sources: list[Tensor] = []  # held, so that no other tensor gets the memory of one that was made for us
        self.around: list[Any] = []  # the containers that it is in


def _take(value: Any, place: str, taken: _Taken) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, _KEPT):
        return value
    for kind, plain in _PLAIN:
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, (bytes, bytearray)):
        return {_TAG: "bytes", "latin1": value.decode("latin1")}  # some versions of torch do not read empty ones
    if isinstance(value, Tensor):
        return _take_tensor(value, place, taken)
    if isinstance(value, np.ndarray):
        return _take_array(value, place, taken)
    return _take_container(value, place, taken)


def _take_tensor(value: Tensor, place: str, taken: _Taken) -> Any:
    tensor = value.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.is_nested or _wraps_others(tensor):
        return _leave_out(value, place, taken)
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    if tensor.layout != torch.strided:
        return tensor.cpu()
    key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
    if key not in taken.copies:
        copy = tensor.cpu().resolve_conj().resolve_neg()
        taken.sources.append(tensor)
        larger = copy.untyped_storage().nbytes() > copy.numel() * copy.itemsize
        taken.copies[key] = copy.clone() if larger else copy
    return taken.copies[key]


def _wraps_others(tensor: object) -> bool:
    """Whether a tensor has no memory of its own, as quantized weights of some libraries."""
    return is_traceable_wrapper_subclass(tensor)


def _take_array(value: NDArray[Any], place: str, taken: _Taken) -> Any:
    if value.dtype.kind in "US":  # strings
        return {_TAG: "array", "dtype": value.dtype.str, "items": value.tolist()}
    try:
        return {_TAG: "array", "values": torch.from_numpy(np.array(value, order="C"))}
    except (TypeError, ValueError):  # of a type that torch does not have, or in another byte order
        return _leave_out(value, place, taken)


def _take_container(value: Any, place: str, taken: _Taken) -> Any:
    if any(value is each for each in taken.around):
        return _leave_out(value, place, taken)
    taken.around.append(value)
    try:
        if isinstance(value, Set):
            items = [_take(item, place, taken) for item in value]
            return {_TAG: "set", "frozen": isinstance(value, frozenset), "items": items}
        inside = members(value)
        if inside is None:
            return _leave_out(value, place, taken)
        return _shaped(value, [(key, _take(item, f"{place}{key}", taken)) for key, item in inside], taken)
    finally:
        taken.around.pop()


def _shaped(value: Any, items: Sequence[tuple[Any, Any]], taken: _Taken) -> Any:
    """A container's members, which are plain already, in the plain structure that says what it was."""
    fields = {key.name: item for key, item in items if isinstance(key, GetAttrKey)}
    pairs = [(key.key, item) for key, item in items if isinstance(key, MappingKey)]
    elements = [item for _, item in items]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {_TAG: "namedtuple", "class": _class_path(type(value)), "fields": fields}
    if isinstance(value, Sequence):
        return tuple(elements) if isinstance(value, tuple) else elements
    if isinstance(value, Mapping) and len(pairs) == len(items):
        if all(type(key) in (str, int) and key != _TAG for key, _ in pairs):
            return dict(pairs)
        return {_TAG: "mapping", "items": _plain_pairs(pairs, taken)}
    if len(fields) == len(items) and (fields or is_dataclass(value)):
        return {_TAG: "dataclass", "class": _class_path(type(value)), "fields": fields}
    if len(pairs) == len(items):
        return {_TAG: "object", "class": _class_path(type(value)), "items": _plain_pairs(pairs, taken)}
    return elements  # of a container that a user registered in pytree


def _plain_pairs(pairs: Iterable[tuple[Any, Any]], taken: _Taken) -> list[tuple[Any, Any]]:
    return [(_take(key, "", taken), item) for key, item in pairs]


def _leave_out(value: Any, place: str, taken: _Taken) -> dict[str, str]:
    taken.left_out.append(place or "all of it")
    return {_TAG: "unsaved", "class": _class_path(type(value))}


def _class_path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _put_together(structure: Mapping[str, Any], allow_classes: bool) -> Any:
    what = structure[_TAG]
    if what == "unsaved":
        return Unsaved(structure["class"])
    if what == "bytes":
        return structure["latin1"].encode("latin1")
    if what == "array" and "dtype" in structure:
        return np.array(structure["items"], dtype=structure["dtype"])
    if what == "array":
        return structure["values"].numpy()
    if what == "mapping":
        pairs = from_storable(structure["items"], allow_classes)
        return dict(pairs)
    if what == "object":
        pairs = from_storable(structure["items"], allow_classes)
        return type(_short_name(structure["class"]), (_LookAlike,), {})(pairs)
    if what == "set":
        items = from_storable(structure["items"], allow_classes)
        return frozenset(items) if structure["frozen"] else set(items)
    fields = {name: from_storable(item, allow_classes) for name, item in structure["fields"].items()}
    if what == "namedtuple":
        return _named_tuple(structure["class"], fields, allow_classes)
    if what == "dataclass":
        return _dataclass(structure["class"], fields, allow_classes)
    raise KeyError(what)


def _named_tuple(path: str, fields: dict[str, Any], allow_classes: bool) -> Any:
    found = _import_class(path, allow_classes)
    fits = found is not None and issubclass(found, tuple) and getattr(found, "_fields", None) == tuple(fields)
    kind: Any = found if fits else namedtuple(_short_name(path), list(fields))
    return tuple.__new__(kind, fields.values())


def _dataclass(path: str, fields: dict[str, Any], allow_classes: bool) -> Any:
    found = _import_class(path, allow_classes)
    fits = found is not None and is_dataclass(found)
    kind: Any = found if fits else make_dataclass(_short_name(path), fields, eq=False)
    value = object.__new__(kind)
    for name, item in fields.items():
        object.__setattr__(value, name, item)  # frozen ones too
    return value


def _import_class(path: str, allow_classes: bool) -> type | None:
    """The class of that name where it may be imported and is there."""
    module, _, name = path.partition(":")
    if not allow_classes and module.partition(".")[0] != "torch":
        return None
    try:
        found = attrgetter(name)(import_module(module))
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) else None


def _short_name(path: str) -> str:
    return path.rpartition(":")[2].rpartition(".")[2]
