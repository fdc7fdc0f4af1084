"""Batches as plain structures: what comes back, of which classes, and that no code runs."""

from __future__ import annotations

import io
import math
import sys
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree as pytree

from stability_callbacks.diagnosis import Unsaved
from stability_callbacks.diagnosis._storable import from_storable, to_storable


class Pair(NamedTuple):
    x: Tensor
    y: Any

    def total(self) -> Tensor:
        return self.x.sum()


@dataclass
class Example:
    image: Any
    label: int = 0
    made: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.made.append("constructed")


@dataclass(frozen=True)
class Frozen:
    x: Any


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: Any


class Color(IntEnum):
    RED = 1


class Task(str, Enum):
    TRAIN = "train"


class Marked(Tensor):
    """A subclass, as libraries of images have them."""


def through_a_file(value: Any, allow_classes: bool = False) -> Any:
    structure, left_out = to_storable(value)
    assert left_out == []
    file = io.BytesIO()
    torch.save(structure, file)
    file.seek(0)
    return from_storable(torch.load(file, weights_only=True), allow_classes)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner, max_size=3)
        | st.dictionaries(st.just("__stored__") | st.text(max_size=1), inner, max_size=3)
        | st.sets(st.integers() | st.text(), max_size=3)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=60)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    back = through_a_file(value)
    assert back == value
    assert repr(type(back)) == repr(type(value))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(math.nan),
        torch.zeros(0, 3),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.bfloat16),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.ones(2, 2).to_sparse(),
        torch.ones(1).expand(4),
        torch.tensor([1, 2], dtype=torch.uint16),
    ],
    ids=["scalar", "empty", "transposed", "bool", "bfloat16", "conjugated", "sparse", "expanded", "uint16"],
)
def test_tensors_come_back_as_they_were(tensor: Tensor) -> None:
    back = through_a_file({"x": tensor})["x"]
    assert (back.dtype, back.shape, back.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert torch.equal(back.to_dense().nan_to_num(7.5), tensor.to_dense().nan_to_num(7.5))


def test_tensors_of_subclasses_and_with_graphs_become_plain() -> None:
    weight = nn.Parameter(torch.ones(2))
    back = through_a_file([weight, weight * 2, torch.ones(2).as_subclass(Marked)])
    assert [type(each) for each in back] == [Tensor] * 3
    assert not any(each.requires_grad for each in back)


def test_only_the_part_that_is_seen_of_a_storage_is_stored() -> None:
    large = torch.zeros(100_000)
    structure, _ = to_storable([large[:2]])
    assert structure[0].untyped_storage().nbytes() == 8


def test_tied_tensors_are_stored_once() -> None:
    layer = nn.Linear(100, 100)
    structure, _ = to_storable({**layer.state_dict(), "tied": layer.state_dict()["weight"]})
    assert structure["tied"] is structure["weight"]


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.bool_, np.complex64, np.uint32, "U3", "S2"])
def test_arrays_come_back_as_they_were(dtype: Any) -> None:
    array = np.array([[1, 0], [2, 3]]).astype(dtype)[:, ::-1]
    back = through_a_file((array,))[0]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_relatives_of_plain_values_become_plain() -> None:
    values = [
        np.float32(0.5),
        np.float64(0.25),
        np.int64(3),
        np.bool_(True),
        Color.RED,
        Task.TRAIN,
        Path("a/b"),
        bytearray(b"x"),
    ]
    back = through_a_file(values)
    assert back == [0.5, 0.25, 3, True, 1, "train", "a/b", b"x"]
    assert [type(each) for each in back] == [float, float, int, bool, int, str, str, bytes]


def test_relatives_of_containers_become_plain() -> None:
    values = [OrderedDict(a=1), UserDict(b=2), deque([3]), torch.Size([4])]
    back = through_a_file(values)
    assert back == [{"a": 1}, {"b": 2}, [3], torch.Size([4])]
    assert [type(each) for each in back] == [dict, dict, list, torch.Size]


# ---- classes


def test_a_named_tuple_comes_back_as_one_that_looks_alike() -> None:
    back = through_a_file([Pair(torch.ones(2), {"z": 3})])[0]
    x, y = back
    assert torch.equal(back.x, x)
    assert back.y == y == {"z": 3}
    assert type(back).__name__ == "Pair"
    assert not isinstance(back, Pair)


@pytest.mark.parametrize("value", [Example("i", 3), Frozen([1]), Slotted((2,))], ids=lambda value: type(value).__name__)
def test_a_dataclass_comes_back_as_one_that_looks_alike(value: Any) -> None:
    back = through_a_file([value])[0]
    assert is_dataclass(back)
    assert not isinstance(back, type(value))
    assert [each.name for each in fields(back)] == [each.name for each in fields(value)]
    assert all(getattr(back, each.name) == getattr(value, each.name) for each in fields(value))
    assert type(back).__name__ == type(value).__name__


@pytest.mark.parametrize("value", [Example("i", 3), Frozen([1]), Slotted((2,))], ids=lambda value: type(value).__name__)
def test_classes_come_back_where_they_may_be_imported(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, type(value).__module__, sys.modules[__name__])
    back = through_a_file([value], allow_classes=True)[0]
    assert type(back) is type(value)
    assert back == value  # an example constructed twice would say so


def test_a_named_tuple_comes_back_where_it_may_be_imported() -> None:
    back = through_a_file(Pair(torch.ones(2), 0), allow_classes=True)
    assert type(back) is Pair
    assert back.total() == 2


def test_a_class_that_is_gone_is_replaced_by_one_that_looks_alike() -> None:
    local = namedtuple("local", "a b")  # can't be imported
    for path in ("no.such.module:Pair", f"{__name__}:NoSuchClass", "builtins:int", f"{__name__}:Frozen"):
        structure, _ = to_storable(local(1, 2))
        assert from_storable({**structure, "class": path}, allow_classes=True) == (1, 2)
        structure, _ = to_storable(Frozen(1))
        replaced = from_storable({**structure, "class": path.replace("Frozen", "Pair")}, allow_classes=True)
        assert is_dataclass(replaced)
        assert replaced.x == 1


def test_packed_sequences_work_without_permission() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.zeros(1, 2)])
    back = through_a_file([packed])[0]
    assert isinstance(back, PackedSequence)
    lstm = nn.LSTM(2, 2)
    assert torch.equal(lstm(back)[0].data, lstm(packed)[0].data)


def test_no_module_of_the_file_is_imported_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dangerous.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    structure, _ = to_storable([Frozen(1), Pair(torch.ones(1), 2)])
    for each in structure:
        each["class"] = "dangerous:Thing"
    first, second = from_storable(structure)
    assert (first.x, second.y) == (1, 2)
    assert "dangerous" not in sys.modules
    with pytest.raises(SystemExit, match="it ran"):
        from_storable(structure, allow_classes=True)


def test_names_that_are_code_make_no_class() -> None:
    for name in ("x: __import__('os').abort() #", "class", "a b"):
        for what in ("namedtuple", "dataclass"):
            with pytest.raises(ValueError, match=r"identifier|keyword|as it should be"):
                from_storable({"__stored__": what, "class": "a:B", "fields": {name: 1}})


class Graph:
    """As PyTorch Geometric's batches."""

    def to_dict(self) -> dict[Any, Any]:
        return {"x": torch.ones(2), ("a", "b"): {"y": [1]}, "__stored__": 3}


@pytest.mark.parametrize("allow_classes", [False, True])
def test_objects_that_read_like_mappings_come_back_as_look_alikes(allow_classes: bool) -> None:
    back = through_a_file([Graph()], allow_classes)[0]
    assert type(back).__name__ == "Graph"
    assert back.x is back["x"]
    assert torch.equal(back.x, torch.ones(2))
    assert back["a", "b"] == {"y": [1]}
    assert back["__stored__"] == 3
    with pytest.raises(AttributeError, match="this Graph has no 'num_graphs': only its items were kept"):
        _ = back.num_graphs


class Empty:
    def to_dict(self) -> dict[str, Any]:
        return {}


class Views:
    """Makes a tensor at each look, which is gone again when the next one is made."""

    def __init__(self, value: float) -> None:
        self.value = value

    def to_dict(self) -> dict[str, Tensor]:
        return {"x": torch.full((1000,), self.value)[:500]}


class Registered:
    def __init__(self, *members: Any) -> None:
        self.members = members


pytree.register_pytree_node(
    Registered,
    lambda node: (list(node.members), None),
    lambda members, _: Registered(*members),
    flatten_with_keys_fn=lambda node: ([(pytree.SequenceKey(i), each) for i, each in enumerate(node.members)], None),
)


def test_containers_of_all_kinds_have_a_plain_structure() -> None:
    assert through_a_file([UserDict(a=1), UserList([2]), deque([3]), Registered(4, [5])]) == [
        {"a": 1},
        [2],
        [3],
        [4, [5]],
    ]
    empty = through_a_file([Empty(), UserDict(), (), Slotted.__new__(Slotted)])
    assert empty[:3] == [{}, {}, ()]
    assert type(empty[0]).__name__ == "Empty"
    assert is_dataclass(empty[3])


def test_tensors_that_are_made_for_a_look_are_not_mixed_up() -> None:
    back = through_a_file([Views(float(value)) for value in range(20)])
    assert [float(each.x[0]) for each in back] == list(range(20))


# ---- what can't be stored, and what can't be read


class Unknown:
    pass


def test_what_can_not_be_stored_is_listed_and_marked() -> None:
    batch = [{"x": torch.ones(1), "image": Unknown()}, (Example(Unknown()), {Unknown}), np.array([None])]
    structure, left_out = to_storable(batch)
    assert left_out == ["[0]['image']", "[1][0].image", "[1][1]", "[2]"]
    file = io.BytesIO()
    torch.save(structure, file)
    file.seek(0)
    back = from_storable(torch.load(file, weights_only=True))
    assert back[0]["image"] == back[1][0].image == Unsaved(f"{__name__}:Unknown")
    assert torch.equal(back[0]["x"], torch.ones(1))
    assert back[2] == Unsaved("numpy:ndarray")
    assert to_storable(Unknown())[1] == ["all of it"]


def test_what_holds_itself_is_left_out_where_it_comes_again() -> None:
    loop: list[Any] = [1]
    loop.append({"again": loop})
    structure, left_out = to_storable([loop, loop])
    assert left_out == ["[0][1]['again']", "[1][1]['again']"]
    assert from_storable(structure)[0] == [1, {"again": Unsaved("builtins:list")}]


@pytest.mark.parametrize(
    "structure",
    [
        {"__stored__": "rocket"},
        {"__stored__": "array", "values": 3},
        {"__stored__": "set", "items": [[]], "frozen": False},
        {"__stored__": "mapping", "items": 3},
        {"__stored__": "dataclass", "class": "a:B"},
        {"__stored__": "namedtuple", "class": "a:B", "fields": 3},
    ],
    ids=str,
)
def test_structures_of_others_are_refused(structure: Any) -> None:
    with pytest.raises(ValueError, match="is not as it should be"):
        from_storable([structure])
