"""The walk through batches and states of any nesting, and how it writes places."""

from __future__ import annotations

import re
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from stability_callbacks._nesting import named_leaves, named_tensors, named_values
from stability_callbacks.detection import input_magnitude
from stability_callbacks.diagnosis import find_cause, tensor_bytes
from stability_callbacks.diagnosis._storable import to_storable
from stability_callbacks.faults import Fault, draw_spot
from tests.host_reads import ForbidHostReads

X, Y, Z = (torch.full((2,), float(value)) for value in range(3))
NAN = float("nan")


@dataclass
class Sample:
    image: Any
    more: Any = field(init=False)  # never set


@dataclass
class Slotted:
    __slots__ = ("image", "more")
    image: Any
    more: Any


Pair = namedtuple("Pair", ["one", "two"])


class PairWithMethods(Pair):
    pass


class Named(dict[str, Any]):
    pass


class Graph:
    """What PyTorch Geometric's batches look like; counts how often it is read."""

    def __init__(self, **items: Any) -> None:
        self.items_ = items
        self.reads: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        self.reads.append("to_dict")
        return dict(self.items_)

    def keys(self) -> list[str]:
        self.reads.append("keys")
        return list(self.items_)

    def __getitem__(self, key: str) -> Any:
        self.reads.append(key)
        return self.items_.setdefault(key, {})  # as heterogeneous graphs make types of nodes


class Row:
    """What has keys and values, and is no mapping."""

    def __init__(self, **items: Any) -> None:
        self._items, self.reads = items, list[str]()

    def keys(self) -> Iterator[str]:
        self.reads.append("keys")
        return iter(self._items)

    def __getitem__(self, key: str) -> Any:
        self.reads.append(key)
        return self._items[key]


class Table(Row):
    def __array__(self, *args: Any) -> Any:
        raise AssertionError("a table is not read")


class Model(nn.Module):
    def keys(self) -> Any:
        raise AssertionError("a module is not read")

    __getitem__ = keys


class WithArguments:
    def to_dict(self, path: str) -> Any:
        raise AssertionError(path)


class Registered:
    def __init__(self, *members: Any) -> None:
        self.members = members


pytree.register_pytree_node(
    Registered, lambda node: (list(node.members), None), lambda members, _: Registered(*members)
)


def extended_sample() -> Sample:
    sample = Sample(X)
    sample.mask = Y  # type: ignore[attr-defined]
    return sample


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, {"b": X}),
        ([X, (Y, 3, "text", None)], {"b[0]": X, "b[1][0]": Y}),
        ({"x": X, 5: [Y], ("a", 1): Z}, {"b['x']": X, "b[5][0]": Y, "b[('a', 1)]": Z}),
        (OrderedDict(x=X), {"b['x']": X}),
        (UserDict(x=X), {"b['x']": X}),
        (Named(x=X), {"b['x']": X}),
        (UserList([X]), {"b[0]": X}),
        (deque([X]), {"b[0]": X}),
        (Pair(X, [Y]), {"b.one": X, "b.two[0]": Y}),
        (PairWithMethods(X, [Y]), {"b.one": X, "b.two[0]": Y}),
        (Sample({"x": X}), {"b.image['x']": X}),
        (extended_sample(), {"b.image": X, "b.mask": Y}),
        (Slotted(X, [Y]), {"b.image": X, "b.more[0]": Y}),
        (Slotted.__new__(Slotted), {}),
        (Graph(x=X, edges=[Y]), {"b['x']": X, "b['edges'][0]": Y}),
        (Row(x=X, more=Row(y=Y)), {"b['x']": X, "b['more']['y']": Y}),
        (Registered(X, [Y]), {"b[0]": X, "b[1][0]": Y}),
        ([X, X], {"b[0]": X, "b[1]": X}),
        ([Sample, 1.5, {}, range(3), Table(x=X), Model(), WithArguments(), Graph, b"bytes", {X}], {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_finds_tensors_in_any_nesting(batch: Any, expected: dict[str, Tensor]) -> None:
    found = dict(named_tensors(batch, "b"))
    assert list(found) == list(expected)
    assert all(found[name] is tensor for name, tensor in expected.items())


def test_places_can_be_written_in_python() -> None:
    batch = {"data": [Pair(X, Sample(Y)), Row(mask=Z)]}
    for place, tensor in named_tensors(batch, "batch"):
        assert eval(place, {"batch": batch}) is tensor


def test_finds_the_data_of_a_packed_sequence() -> None:
    packed = pack_sequence([X, Y])
    assert dict(named_tensors(packed, "b"))["b.data"] is packed.data


@pytest.mark.parametrize(("make", "reads"), [(Graph, ["to_dict"]), (Row, ["keys", "x", "y"])])
def test_objects_are_read_once_and_left_as_they_were(make: Any, reads: list[str]) -> None:
    batch = make(x=X, y=Y)
    assert len(list(named_tensors([batch], "b"))) == 2
    assert batch.reads == reads


def test_fields_are_read_once() -> None:
    reads = []

    @dataclass
    class Lazy:
        image: Any = None

        def __getattribute__(self, name: str) -> Any:
            if name == "image":
                reads.append(name)
            return object.__getattribute__(self, name)

    list(named_tensors(Lazy(X), "b"))
    assert reads == ["image"]


class Endless(Row):
    """Gives a new object of its kind at each look."""

    def __getitem__(self, key: str) -> Any:
        return Endless(one=1, two=2)


def looped() -> list[Any]:
    loop: list[Any] = [X]
    loop.append({"again": loop, "y": Y})
    return loop


def test_cycles_end() -> None:
    assert list(dict(named_tensors(looped(), "b"))) == ["b[0]", "b[1]['y']"]
    sample = Sample(X)
    sample.more = sample
    assert list(dict(named_tensors(sample, "b"))) == ["b.image"]
    assert not list(named_tensors(Endless(one=1, two=2), "b"))


def test_values_are_tensors_arrays_and_numbers_of_floating_point() -> None:
    batch = [
        1.5,
        np.float32(2),
        np.ones(2, ">f8"),
        np.ones(1, np.longdouble),
        np.arange(3),
        7,
        True,
        torch.tensor(3),
        Y,
    ]
    found = dict(named_values(batch))
    assert list(found) == ["batch[0]", "batch[1]", "batch[2]", "batch[3]", "batch[8]"]
    assert [value.flatten()[0].item() for value in found.values()] == [1.5, 2, 1, 1, 1]
    assert found["batch[8]"] is Y


def test_leaves_are_all_that_is_no_container() -> None:
    leaves = dict(named_leaves({"x": [1, None], "y": "text"}, "b"))
    assert leaves == {"b['x'][0]": 1, "b['x'][1]": None, "b['y']": "text"}


def test_the_host_reads_nothing() -> None:
    with ForbidHostReads():
        list(named_tensors([X, Graph(x=X), Sample(Y)], "b"))


# ---- one walk for all who look into batches

WRAPS: dict[str, Any] = {
    "list": lambda x: [x],
    "mapping": lambda x: UserDict(x=x),
    "dataclass": Sample,
    "slots": lambda x: Slotted(x, None),
    "graph": lambda x: Graph(x=x),
    "row": lambda x: [Row(x=x)],
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_tensor_has_the_same_place_for_detector_cause_bundle_and_fault(wrap: Any) -> None:
    x = torch.tensor([1.0, NAN])
    batch = wrap(x)
    ((place, _),) = named_tensors(batch, "batch")
    magnitude = input_magnitude(batch)
    assert magnitude is not None
    assert magnitude.isnan()
    assert tensor_bytes(batch) == x.nbytes
    model = nn.Linear(2, 1)
    cause = find_cause(model, lambda: model(x).sum(), batch)
    assert cause.explanation.startswith(f"{place} held 1 NaN")
    fault = Fault("input", steps=0, where=f"^{re.escape(place)}$")
    spot = draw_spot(fault, 0, named_tensors(batch, "batch"))
    assert spot is not None
    assert spot.name == place
    _, left_out = to_storable(wrap(object()))
    assert [f"batch{each}" for each in left_out] == [place]
