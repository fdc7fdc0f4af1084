"""Counts against numpy.histogram, and everything a tensor can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stability_callbacks.histograms import Histograms, _measure, measure_histograms
from stability_callbacks.histograms._sample import sampling_stride

FIELDS = ("minimum", "maximum", "count", "sum", "sum_squares", "nonfinite", "edges", "bucket_counts")
seeds = st.integers(0, 2**32 - 1)


def measure(tensor: Tensor, **arguments: int) -> Histograms:
    return measure_histograms([("x", tensor)], **arguments)


def numbers(histograms: Histograms) -> dict[str, list]:
    return {field: getattr(histograms, field).tolist() for field in FIELDS}


def ordinary_size(values: np.ndarray) -> float:
    return float(np.mean(np.sqrt(np.abs(values))) ** 2) or 1.0


def random_values(seed: int, kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return {
        "normal": lambda: rng.normal(size=size),
        "offset": lambda: 5 + rng.normal(size=size),
        "positive": lambda: rng.exponential(size=size),
        "negative": lambda: -rng.exponential(size=size),
        "heavy": lambda: rng.standard_t(1.5, size=size),
        "sparse": lambda: rng.normal(size=size) * (rng.random(size) < 0.1),
        "log-normal": lambda: rng.choice([-1, 1], size) * rng.lognormal(0, 5, size=size),
    }[kind]() * 10.0 ** rng.uniform(-12, 12)


kinds = st.sampled_from(["normal", "offset", "positive", "negative", "heavy", "sparse", "log-normal"])


class TestAgainstNumpy:
    @given(seed=seeds, kind=kinds, size=st.integers(1, 400), bins=st.integers(1, 80))
    def test_double_precision(self, seed: int, kind: str, size: int, bins: int) -> None:
        """No random element lies within the rounding of an edge, so the counts are numpy's to the last one."""
        values = random_values(seed, kind, size)
        histograms = measure(torch.from_numpy(values), bins=bins)
        edges = histograms.edges[0].numpy()
        if edges[0] < edges[-1]:
            expected, _ = np.histogram(values, bins=edges)
            # Zeros of a sparse tensor are many, and may share their place with an edge.
            if not np.isclose(edges, 0, atol=1e-12 * ordinary_size(values)).any():
                assert histograms.bucket_counts[0].tolist() == expected.tolist()
        assert histograms.bucket_counts.sum().item() == size
        assert (edges[0], edges[-1]) == (values.min(), values.max())
        assert histograms.sum.item() == pytest.approx(values.sum(), rel=1e-9, abs=1e-12 * np.abs(values).sum())
        assert histograms.sum_squares.item() == pytest.approx((values**2).sum(), rel=1e-9)

    @given(seed=seeds, kind=kinds, size=st.integers(1, 400), bins=st.integers(1, 80), dtype=st.sampled_from([0, 1, 2]))
    def test_single_and_half_precision(self, seed: int, kind: str, size: int, bins: int, dtype: int) -> None:
        """An element within rounding of an edge may be counted on either side of it, and no other."""
        dtype_ = (torch.float32, torch.float16, torch.bfloat16)[dtype]
        tensor = torch.from_numpy(random_values(seed, kind, size)).to(dtype_)
        tensor = torch.where(tensor.isfinite(), tensor, 0)  # what overflows in half precision
        values = tensor.double().numpy()
        histograms = measure(tensor, bins=bins)
        edges, counts = histograms.edges[0].numpy(), histograms.bucket_counts[0].numpy()
        slack = 1e-5 * (np.abs(edges) + ordinary_size(values))
        below = np.concatenate([[0], counts.cumsum()])
        for k in range(1, bins):
            assert (values < edges[k] - slack[k]).sum() <= below[k] <= (values < edges[k] + slack[k]).sum()
        assert counts.sum() == histograms.count.item() == size
        assert (edges[0], edges[-1]) == (values.min(), values.max())
        assert histograms.sum.item() == pytest.approx(values.sum(), rel=1e-5, abs=1e-6 * np.abs(values).sum())
        assert histograms.sum_squares.item() == pytest.approx((values**2).sum(), rel=1e-5)

    @given(seed=seeds, kind=kinds, size=st.integers(2, 400), bins=st.integers(1, 80))
    def test_edges(self, seed: int, kind: str, size: int, bins: int) -> None:
        """Equally spaced in sign(x) ln(1 + |x| / s), ascending from the smallest to the largest element."""
        values = random_values(seed, kind, size)
        scale = ordinary_size(values)
        ends = np.array([values.min(), values.max()]) / scale
        first, last = np.sign(ends) * np.log1p(np.abs(ends))
        symlog = np.linspace(first, last, bins + 1)
        expected = np.sign(symlog) * np.expm1(np.abs(symlog)) * scale
        edges = measure(torch.from_numpy(values), bins=bins).edges[0].numpy()
        np.testing.assert_allclose(edges, expected, rtol=1e-9, atol=1e-9 * scale)
        assert (np.diff(edges) >= 0).all()

    def test_an_outlier_leaves_the_others_spread_out(self) -> None:
        values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        values[0] = 1e5
        counts = measure(values).bucket_counts[0]
        assert (counts > 0).sum() >= 12
        assert counts.max() < 0.4 * len(values)
        # For comparison: buckets of equal width have all but one element in the first.
        assert torch.histc(values, 64).tolist()[0] == 9999


class TestTensors:
    """Everything a gradient can be."""

    @pytest.mark.parametrize(
        ("tensor", "expected"),
        [
            (torch.empty(0), (0, 0, 0, 0, 0, 0)),
            (torch.empty(3, 0, 2), (0, 0, 0, 0, 0, 0)),
            (torch.tensor(-3.0), (-3, -3, 1, -3, 9, 0)),
            (torch.zeros(5), (0, 0, 5, 0, 0, 0)),
            (torch.full((7,), -2.0), (-2, -2, 7, -14, 28, 0)),
            (torch.full((3,), math.nan), (0, 0, 0, 0, 0, 3)),
            (torch.tensor([math.nan, math.inf, -math.inf, 1.0, -2.0]), (-2, 1, 2, -1, 5, 3)),
            (torch.full((1000,), 60_000.0, dtype=torch.float16), (6e4, 6e4, 1000, 6e7, 3.6e12, 0)),
            (torch.tensor([3e38, -3e38, 3e38]), (-3e38, 3e38, 3, 3e38, 2.7e77, 0)),
            (torch.tensor([2e-45, -2e-45]), (-1.401298464e-45, 1.401298464e-45, 2, 0, 3.9272754e-90, 0)),
            (torch.tensor([1e300, -1e300], dtype=torch.float64), (-1e300, 1e300, 2, 0, math.inf, 0)),
            (torch.tensor([3 + 4j, 0, complex(math.nan, 1)]), (0, 5, 2, 5, 25, 1)),
            (torch.tensor([3e38 + 3e38j]), (4.2426407e38, 4.2426407e38, 1, 4.2426407e38, 1.8e77, 0)),
            (torch.tensor([True, False, True]), (0, 1, 3, 2, 2, 0)),
            (torch.tensor([1, 2, 3]), (1, 3, 3, 6, 14, 0)),
            (torch.tensor(2.0).expand(10), (2, 2, 10, 20, 40, 0)),
            (torch.arange(12.0).view(3, 4).t(), (0, 11, 12, 66, 506, 0)),
            (torch.arange(20.0)[::3], (0, 18, 7, 63, 819, 0)),
            (torch.nn.Parameter(torch.tensor([1.0, 2.0])), (1, 2, 2, 3, 5, 0)),
        ],
        ids=str,
    )
    def test_moments(self, tensor: Tensor, expected: tuple[float, ...]) -> None:
        histograms = measure(tensor, bins=8)
        actual = [getattr(histograms, field).item() for field in FIELDS[:6]]
        assert actual == pytest.approx(expected, rel=1e-6)
        assert histograms.bucket_counts.sum().item() == expected[2]
        assert histograms.edges.isfinite().all()
        assert not histograms.edges.requires_grad

    def test_sparse_gradient(self) -> None:
        """The rows that an embedding looked up, those looked up twice as one sum."""
        embedding = torch.nn.Embedding(10, 2, sparse=True)
        embedding(torch.tensor([1, 1, 4])).sum().backward()
        assert numbers(measure(embedding.weight.grad)) == numbers(measure(torch.tensor([2.0, 2.0, 1.0, 1.0])))

    def test_memory_layout_does_not_matter(self) -> None:
        tensor = torch.randn(2, 3, 4, 5)
        for other in (tensor.to(memory_format=torch.channels_last), tensor.transpose(0, 3), tensor.flip(1)):
            ours, theirs = numbers(measure(other)), numbers(measure(tensor))
            assert ours["bucket_counts"] == theirs["bucket_counts"]
            assert ours["sum"] == pytest.approx(theirs["sum"], abs=1e-5)

    @given(seed=seeds, size=st.integers(1, 300))
    def test_nonfinite_elements_change_nothing(self, seed: int, size: int) -> None:
        rng = np.random.default_rng(seed)
        values = rng.normal(size=size)
        where = rng.integers(0, size + 1, rng.integers(0, 20))
        poisoned = np.insert(values, where, rng.choice([math.nan, math.inf, -math.inf], len(where)))
        clean, ours = numbers(measure(torch.from_numpy(values))), numbers(measure(torch.from_numpy(poisoned)))
        assert ours.pop("nonfinite") == [len(where)]
        assert clean.pop("nonfinite") == [0]
        for field, value in clean.items():
            np.testing.assert_allclose(ours[field], value, rtol=1e-9, atol=1e-12, err_msg=field)

    def test_input_is_left_alone(self) -> None:
        tensor = torch.tensor([1.0, math.nan, -3.0])
        measure(tensor)
        assert tensor.tolist()[::2] == [1.0, -3.0]
        assert tensor[1].isnan()


class TestManyTensors:
    @settings(max_examples=30)
    @given(seed=seeds, table_elements=st.sampled_from([1, 100, 1000, 2**18]))
    def test_as_each_alone_and_in_order(self, seed: int, table_elements: int) -> None:
        rng = np.random.default_rng(seed)
        dtypes = (torch.float32, torch.float64, torch.bfloat16)
        named = [
            (f"{i}", torch.from_numpy(rng.normal(size=rng.integers(0, 200))).to(dtypes[rng.integers(3)]))
            for i in range(rng.integers(1, 20))
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_measure, "_TABLE_ELEMENTS", table_elements)
            together = measure_histograms(named, bins=10)
        assert together.names == tuple(name for name, _ in named)
        for field in FIELDS:
            alone = torch.cat([getattr(measure(tensor, bins=10), field) for _, tensor in named])
            torch.testing.assert_close(getattr(together, field), alone, rtol=1e-5, atol=1e-5)

    def test_none_at_all(self) -> None:
        histograms = measure_histograms([], bins=5)
        assert histograms.names == ()
        assert (histograms.edges.shape, histograms.bucket_counts.shape) == ((0, 6), (0, 5))
        assert list(histograms.raw()) == []

    def test_packing_is_reversible(self) -> None:
        histograms = measure_histograms([("a", torch.randn(50)), ("b", torch.tensor([1.0, math.nan]))])
        rebuilt = Histograms.unpack(histograms.names, histograms.pack())
        assert rebuilt.names == histograms.names
        assert numbers(rebuilt) == numbers(histograms)


class TestSampling:
    @given(numel=st.integers(0, 10**9), max_elements=st.integers(1, 2**24))
    def test_stride(self, numel: int, max_elements: int) -> None:
        stride = sampling_stride(numel, max_elements)
        assert -(-numel // stride) <= max_elements
        assert math.gcd(stride, numel) == 1 or numel == 0
        if numel <= max_elements:
            assert stride == 1

    def test_counts_every_kth_element_only(self) -> None:
        tensor = torch.randn(1000)
        sampled = measure(tensor, max_elements=100)
        assert numbers(sampled) == numbers(measure(tensor[:: sampling_stride(1000, 100)].clone()))
        assert sampled.count.item() == 91

    def test_meets_every_row_and_column(self) -> None:
        for axis in (0, 1):
            index = torch.arange(256.0).expand(256, 256)
            tensor = index.t() if axis else index.contiguous()
            counts = measure(tensor, bins=1, max_elements=4096)
            assert (counts.minimum.item(), counts.maximum.item()) == (0, 255)
        flat = torch.arange(256.0).expand(256, 256).reshape(-1)
        assert len(flat[:: sampling_stride(256 * 256, 4096)].unique()) == 256

    @pytest.mark.parametrize("piece", [7, 2**18])
    def test_nonfinite_elements_are_counted_outside_the_sample_too(
        self, monkeypatch: pytest.MonkeyPatch, piece: int
    ) -> None:
        monkeypatch.setattr(_measure, "_TABLE_ELEMENTS", piece)
        tensor = torch.zeros(10, 100)
        tensor[3, :50] = math.nan
        tensor[7, 7] = -math.inf
        histograms = measure(tensor, max_elements=10)
        assert histograms.nonfinite.item() == 51
        assert histograms.count.item() <= 10


class HostReads(TorchDispatchMode):
    """Counts operations, and raises on those that make the host wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "equal", "item", "histc")

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or any(isinstance(arg, Tensor) and arg.dtype == torch.bool for arg in args[1:]):
            raise AssertionError(f"{name} makes the host wait")
        return func(*args, **(kwargs or {}))


class TestNoHostRead:
    def test_runs_without_data(self) -> None:
        """On the meta device, where there are no values, everything that would read one raises."""
        named = [("a", torch.empty(100, device="meta")), ("b", torch.empty(300_000, dtype=torch.half, device="meta"))]
        histograms = measure_histograms(named)
        assert histograms.edges.device.type == "meta"
        assert histograms.bucket_counts.shape == (2, 64)

    def test_calls_no_operation_that_waits(self) -> None:
        with HostReads():
            measure_histograms([("a", torch.randn(100)), ("b", torch.randn(100).bfloat16())], max_elements=50)
        with pytest.raises(AssertionError, match="_local_scalar_dense"), HostReads():
            torch.randn(3).max().item()

    def test_few_operations_a_tensor(self) -> None:
        def operations(tensors: int) -> int:
            with HostReads() as mode:
                measure_histograms([(f"{i}", torch.zeros(50)) for i in range(tensors)])
            return mode.operations

        assert (operations(120) - operations(20)) / 100 <= 15


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"bins": 0}, ValueError, r"`bins` must be an integer >= 1, got 0"),
            ({"bins": 6.4}, TypeError, r"`bins` must be an integer >= 1, got 6.4"),
            ({"max_elements": 0}, ValueError, r"`max_elements` must be an integer >= 1 and <= .*, got 0"),
            ({"max_elements": 2**24 + 1}, ValueError, r"`max_elements` must be an integer .*, got 16777217"),
        ],
    )
    def test_numbers(self, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            measure(torch.zeros(3), **arguments)

    def test_a_gradient_that_is_none(self) -> None:
        with pytest.raises(TypeError, match=r"`named_tensors` must be pairs of a name and a tensor, got None"):
            measure_histograms([("w", None)])
