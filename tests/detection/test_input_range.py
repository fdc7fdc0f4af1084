"""InputRange, and the measurement of a batch of any structure."""

from __future__ import annotations

import math
from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils.rnn import pack_sequence

from stability_callbacks.detection import Detector, InputRange, input_magnitude
from tests.detection.evidence import evidence
from tests.host_reads import ForbidHostReads

NAN, INF = math.nan, math.inf


class Pair(NamedTuple):
    left: Any
    right: Any = None


@dataclass
class Sample:
    image: Any
    tags: list[str] = field(default_factory=list)
    unset: Any = field(init=False)


def magnitude(batch: Any) -> float:
    measured = input_magnitude(batch)
    assert measured is not None
    assert measured.shape == ()
    return float(measured)


def vote(detector: InputRange, value: float | None) -> bool:
    measured = None if value is None else torch.tensor(value)
    verdict = detector(evidence(input_magnitude=measured))
    assert verdict.shape == ()
    assert verdict.dtype == torch.bool
    return bool(verdict)


@pytest.mark.parametrize(
    ("max_abs", "value", "expected"),
    [
        (None, 1e30, False),
        (None, INF, True),
        (None, NAN, True),
        (50, 50.0, False),
        (50, 50.1, True),
        (50, 0.0, False),
        (50, NAN, True),
        (50, INF, True),
        (50, None, False),
        (None, None, False),
    ],
)
def test_votes(max_abs: float | None, value: float | None, expected: bool) -> None:
    assert vote(InputRange(max_abs), value) == expected


WRAPPED = {
    "tensor": lambda x: x,
    "list": lambda x: [torch.zeros(2), x],
    "tuple": lambda x: (x, torch.tensor([1])),
    "named tuple": lambda x: Pair(torch.zeros(1), x),
    "dict": lambda x: {"a": torch.zeros(1), "b": x},
    "ordered dict": lambda x: OrderedDict(b=x),
    "mapping": lambda x: UserDict(b=x),
    "dataclass": lambda x: Sample(x, ["x"]),
    "packed sequence": lambda x: pack_sequence([x.flatten(), torch.zeros(1)]),
    "deep": lambda x: [{"a": (Pair([Sample({"x": [x]})]), "text", 3, None)}, torch.zeros(0)],
}


@pytest.mark.parametrize("value", [-7.0, NAN, INF, -INF])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_looks_into_any_nesting(wrap: str, value: float) -> None:
    measured = magnitude(WRAPPED[wrap](torch.tensor([1.0, value, 2.0])))
    assert measured == abs(value) or (math.isnan(measured) and math.isnan(value))


@pytest.mark.parametrize(
    "batch", [None, 3.0, "text", [], {}, torch.tensor([9]), [torch.tensor([True]), "x", {"n": 1}], Sample, object()]
)
def test_is_none_where_there_is_nothing_to_measure(batch: Any) -> None:
    assert input_magnitude(batch) is None


def test_numbers_that_are_not_real_valued_are_passed_over() -> None:
    assert magnitude([torch.tensor([1e9], dtype=torch.long), torch.tensor([True]), torch.tensor([0.5])]) == 0.5


def test_empty_tensors_have_magnitude_zero() -> None:
    assert magnitude(torch.zeros(0, 3)) == 0.0
    assert magnitude([torch.zeros(0), torch.tensor(-2.0)]) == 2.0


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.float16, 60000.0, 60000.0),
        (torch.bfloat16, -(2.0**100), 2.0**100),
        (torch.float32, 3e38, 3e38),
        (torch.float64, -1e300, 1e300),
        (torch.complex64, 3 - 4j, 5.0),
        (torch.complex128, 3e200 - 4e200j, 5e200),
        (torch.float8_e4m3fn, -448.0, 448.0),
    ],
)
def test_every_floating_point_type_counts(dtype: torch.dtype, value: complex, expected: float) -> None:
    tensor = torch.tensor([0.0, value]).to(dtype) if dtype.itemsize == 1 else torch.tensor([0.0, value], dtype=dtype)
    assert magnitude([tensor, torch.tensor([1.0])]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_tensors_count_by_their_values() -> None:
    twice = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,), check_invariants=True)
    assert magnitude(twice) == 5.0
    assert magnitude(torch.eye(3).mul(-4).to_sparse_csr()) == 4.0


def test_a_sharded_tensor_counts_by_its_local_values(
    tmp_path: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    request.addfinalizer(torch.distributed.destroy_process_group)
    monkeypatch.setattr("stability_callbacks.gradient_pass._norms.all_reduce", lambda *_: pytest.fail("a collective"))
    mesh = init_device_mesh("cpu", (1,))
    sharded = DTensor.from_local(torch.tensor([1.0, -8.0]), mesh, [Shard(0)])
    assert not isinstance(input_magnitude(sharded), DTensor)
    assert magnitude([sharded]) == 8.0


def test_a_large_tensor_hides_nothing() -> None:
    for value in (-5.0, NAN, -INF):
        large = torch.zeros(100, 100)
        large[37, 21] = value
        assert vote(InputRange(4.0), magnitude(large))


values = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(st.one_of(values, st.sampled_from((NAN, INF, -INF))), max_size=5), min_size=1, max_size=5))
def test_equals_the_largest_absolute_value(rows: list[list[float]]) -> None:
    flat = [abs(value) for row in rows for value in row]
    expected = NAN if any(math.isnan(value) for value in flat) else max(flat, default=0.0)
    batch = [torch.tensor(row) for row in rows]
    assert magnitude(batch) == expected or (math.isnan(expected) and math.isnan(magnitude(batch)))


@pytest.mark.parametrize("parts", [(1.0, NAN), (NAN, 1.0), (NAN, INF), (INF, NAN)])
def test_a_maximum_over_micro_batches_keeps_a_nan(parts: tuple[float, float]) -> None:
    first, second = (input_magnitude(torch.tensor([part])) for part in parts)
    assert first is not None
    assert second is not None
    assert torch.maximum(first, second).isnan()


def test_inputs_with_a_graph_are_let_go_of() -> None:
    measured = input_magnitude(torch.ones(2, requires_grad=True) * 2)
    assert isinstance(measured, Tensor)
    assert not measured.requires_grad


def test_the_host_reads_nothing() -> None:
    batch = {"x": torch.randn(3, 4), "y": [torch.randn(2).double(), torch.tensor([1])]}
    with ForbidHostReads():
        InputRange(5.0)(evidence(input_magnitude=input_magnitude(batch)))


def test_is_a_plain_value() -> None:
    detector = InputRange(50)
    assert isinstance(detector, Detector)
    assert (detector.kind, detector.needs_inputs, detector.max_abs, detector.state_dict()) == ("input", True, 50.0, {})
    assert repr(detector) == "InputRange(max_abs=50.0)"
    assert repr(InputRange()) == "InputRange(max_abs=None)"


@pytest.mark.parametrize(
    ("max_abs", "error"), [(0, ValueError), (-1.0, ValueError), (NAN, ValueError), ("5", TypeError)]
)
def test_bad_arguments_are_named(max_abs: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`max_abs` must be a number > 0"):
        InputRange(max_abs)
