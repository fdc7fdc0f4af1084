"""What TensorBoard is given, and what it makes of it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard import data_compat
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator
from tensorboard.plugins.distribution.compressor import compress_histogram
from tensorboard.util import tensor_util
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import histogram, histogram_raw

from stability_callbacks.histograms import RawHistogram, measure_histograms


def raw(tensor: Tensor, **arguments: int) -> RawHistogram:
    (histogram,) = measure_histograms([("x", tensor)], **arguments).raw()
    return histogram


def displayed(histogram: RawHistogram) -> np.ndarray:
    """The buckets that TensorBoard's pages are given: rows of left edge, right edge, count."""
    arguments = dict(histogram)
    (value,) = histogram_raw(arguments.pop("tag"), **arguments).value
    return tensor_util.make_ndarray(data_compat.migrate_value(value).tensor)


class TestRaw:
    @given(
        st.lists(st.floats(width=32), min_size=1, max_size=50).filter(lambda values: any(map(math.isfinite, values))),
        st.integers(1, 70),
    )
    def test_shape(self, values: list[float], bins: int) -> None:
        """Strictly ascending limits that begin at the minimum, end at the maximum, and hold every finite element."""
        histogram = raw(torch.tensor(values), bins=bins)
        finite = [value for value in values if math.isfinite(value)]
        limits, counts = histogram["bucket_limits"], histogram["bucket_counts"]
        assert len(limits) == len(counts) <= bins + 1
        assert all(left < right for left, right in pairwise(limits))
        assert (limits[0], limits[-1]) == (histogram["min"], histogram["max"]) == (min(finite), max(finite))
        assert sum(counts) == histogram["num"] == len(finite)
        assert type(histogram["num"]) is int

    @pytest.mark.parametrize("bins", [1, 64])
    def test_constant(self, bins: int) -> None:
        histogram = raw(torch.full((7,), -2.0), bins=bins)
        assert (histogram["bucket_limits"], histogram["bucket_counts"]) == ([-2.0], [7.0])

    def test_two_neighboring_numbers(self) -> None:
        values = torch.tensor([1.0, np.nextafter(1.0, 2.0)], dtype=torch.float64)
        histogram = raw(values)
        assert histogram["bucket_limits"] == values.tolist()
        assert sum(histogram["bucket_counts"]) == 2

    def test_left_out_without_a_finite_element(self) -> None:
        named = [("nan", torch.tensor([math.nan])), ("good", torch.tensor([1.0])), ("empty", torch.empty(0))]
        histograms = measure_histograms(named)
        assert [histogram["tag"] for histogram in histograms.raw()] == ["good"]
        assert histograms.nonfinite.tolist() == [1, 0, 0]

    def test_one_transfer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From another device everything travels as one table."""
        histograms = measure_histograms([("a", torch.empty(9, device="meta")), ("b", torch.empty(5, device="meta"))])
        host = measure_histograms([("a", torch.arange(9.0)), ("b", torch.ones(5))])
        travelled = []

        def cpu(table: Tensor) -> Tensor:
            travelled.append(table.shape)
            return host.pack()

        monkeypatch.setattr(Tensor, "cpu", cpu)
        assert list(histograms.raw()) == list(host.raw())
        assert travelled == [(2, 2 * 64 + 7)]

    def test_at_home_nothing_travels(self) -> None:
        histograms = measure_histograms([("a", torch.arange(9.0))])
        assert histograms.to_host() is histograms


class TestEventFile:
    def test_comes_back_as_written(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        named = [
            ("gradients/normal", torch.randn(1000)),
            ("gradients/heavy", torch.randn(1000).exp().pow(3)),
            ("gradients/constant", torch.ones(3)),
            ("gradients/poisoned", torch.tensor([math.nan, 1.0, 2.0])),
        ]
        expected = [*measure_histograms(named).raw()]
        with SummaryWriter(tmp_path) as writer:
            for histogram in expected:
                writer.add_histogram_raw(**histogram, global_step=7)
        events = EventAccumulator(str(tmp_path), size_guidance={HISTOGRAMS: 0}).Reload()
        assert events.Tags()["histograms"] == [name for name, _ in named]
        for histogram in expected:
            (event,) = events.Histograms(histogram["tag"])
            value = event.histogram_value
            assert event.step == 7
            assert (value.min, value.max, value.num) == (histogram["min"], histogram["max"], histogram["num"])
            assert (value.sum, value.sum_squares) == (histogram["sum"], histogram["sum_squares"])
            assert list(value.bucket_limit) == histogram["bucket_limits"]
            assert list(value.bucket) == histogram["bucket_counts"]

    def test_counts_in_the_file_are_numpys(self, tmp_path: Path) -> None:
        values = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with SummaryWriter(tmp_path) as writer:
            writer.add_histogram_raw(**raw(values), global_step=0)
        (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("x")
        limits, counts = event.histogram_value.bucket_limit, event.histogram_value.bucket
        assert counts[0] == 0
        assert counts[1:] == np.histogram(values.numpy(), bins=np.array(limits))[0].tolist()


class TestDisplay:
    def test_buckets_have_both_edges(self) -> None:
        values = torch.linspace(-1, 3, 100)
        buckets = displayed(raw(values, bins=8))
        assert (buckets[0, 0], buckets[-1, 1]) == (-1, 3)
        assert buckets[:, 2].sum() == 100
        np.testing.assert_array_equal(buckets[1:, 0], buckets[:-1, 1])

    def test_constant(self) -> None:
        assert displayed(raw(torch.full((7,), 2.0))).tolist() == [[2.0, 2.0, 7.0]]

    @settings(max_examples=20)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1e3, 1e6]))
    def test_percentiles_of_heavy_tails(self, seed: int, outlier: float) -> None:
        """The Distributions page reads percentiles off the buckets, right to a few hundredths of the spread."""
        values = torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
        values[0] = outlier
        shown = dict(compress_histogram(displayed(raw(values))))
        for basis_point in (668, 1587, 3085, 5000, 6915, 8413, 9332):
            assert shown[basis_point] == pytest.approx(np.percentile(values.numpy(), basis_point / 100), abs=0.1)

    def test_percentiles_with_equal_widths_would_be_off(self) -> None:
        values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        values[0] = 1e6
        counts, edges = np.histogram(values.numpy(), bins=64)
        linear = RawHistogram(
            tag="x",
            min=float(values.min()),
            max=float(values.max()),
            num=len(values),
            sum=0.0,
            sum_squares=0.0,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.astype(float).tolist(),
        )
        shown = dict(compress_histogram(displayed(linear)))
        assert abs(shown[5000]) > 1000

    def test_as_torchs_own_histogram_of_the_same_buckets(self) -> None:
        values = torch.arange(100.0)
        ours = raw(values)
        (theirs,) = histogram("x", values, bins=np.array(ours["bucket_limits"])).value
        assert list(theirs.histo.bucket_limit) == ours["bucket_limits"]
        assert list(theirs.histo.bucket) == ours["bucket_counts"]
        assert (theirs.histo.min, theirs.histo.max, theirs.histo.num) == (ours["min"], ours["max"], ours["num"])
        assert (theirs.histo.sum, theirs.histo.sum_squares) == pytest.approx((ours["sum"], ours["sum_squares"]))
