"""Counting: one table of samples at a time, all rows by the same few operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stability_callbacks._validation import check_instance, check_integer
from stability_callbacks.histograms._histograms import Histograms
from stability_callbacks.histograms._sample import Sample, draw_sample

# Elements of a table of samples: enough rows to share the cost of an operation, few enough for the caches.
_TABLE_ELEMENTS = 2**18
# float32 counts exactly to here.
_MAX_ELEMENTS = 2**24


@torch.no_grad()
def measure_histograms(
    named_tensors: Iterable[tuple[str, Tensor]], bins: int = 64, max_elements: int = 65_536
) -> Histograms:
    r"""Count the elements of many tensors into buckets, on their device and without waiting for it.

    Use it where histograms of gradients or weights are logged during training: ``SummaryWriter.add_histogram``
    moves every element to the host and sorts it into buckets there. Nothing here reads a value on the host; the
    numbers travel when ``Histograms.to_host`` or ``Histograms.raw`` is called, in one transfer.

    Buckets are equally wide in :math:`\operatorname{symlog}(x / s)` between the smallest and the largest element,

    .. math::
        \operatorname{symlog}(x) = \operatorname{sign}(x) \ln(1 + |x|), \qquad
        s = \Bigl(\tfrac1n \textstyle\sum_i \sqrt{|x_i|}\Bigr)^2

    so they are linear for elements of the ordinary size :math:`s`, which a few outliers hardly move, and logarithmic
    beyond. Gradients are heavy-tailed: with equal widths one outlier would leave all the others in a single bucket.

    Args:
        named_tensors: Pairs of a name and a tensor: any shape, layout, device and floating or complex type (absolute
            values), empty ones too. Of sparse tensors the stored values count; coalescing them is the one thing that
            may wait for the device. Of a ``DTensor`` the shards of all processes count, by three small all-reduces
            for about 250,000 elements; all processes must pass the same tensors in the same order.
        bins: Number of buckets, >= 1.
        max_elements: Number of elements sampled at most from a tensor, >= 1. A larger tensor is sampled at equal
            strides, the same elements every time.

    Returns:
        The histograms, in the order of the tensors, on the device of the first.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``bins`` or ``max_elements`` is out of bounds.

    Example:
        >>> histograms = measure_histograms([("weight", torch.tensor([-1.0, 0.0, 0.0, 1.0, float("nan")]))], bins=4)
        >>> histograms.bucket_counts, histograms.nonfinite
        (tensor([[1., 0., 2., 1.]], dtype=torch.float64), tensor([1.], dtype=torch.float64))

    References:
        Hafner et al. 2023, "Mastering Diverse Domains through World Models", arXiv 2301.04104 (symlog).
    """
    bins = check_integer("bins", bins, at_least=1)
    max_elements = check_integer("max_elements", max_elements, at_least=1, at_most=_MAX_ELEMENTS)
    names: list[str] = []
    samples: list[Sample] = []
    for name, tensor in named_tensors:
        names.append(name)
        samples.append(
            draw_sample(check_instance("named_tensors", tensor, Tensor, "pairs of a name and a tensor"), max_elements)
        )
    if not samples:
        return Histograms.unpack((), torch.zeros(0, 2 * bins + 7, dtype=torch.float64))

    device = samples[0].values.device
    rows: dict[int, Tensor] = {}
    for indices in _batches(samples):
        table = _count([samples[index] for index in indices], bins).pack().to(device, non_blocking=True)
        rows.update(zip(indices, table, strict=True))
    return Histograms.unpack(tuple(names), torch.stack([rows[index] for index in range(len(rows))]))


def _batches(samples: list[Sample]) -> Iterator[list[int]]:
    """Yield the indices of samples that are counted together: of one kind, and of like size to waste little padding.

    Every process of a group makes the same batches, because the sizes are the same on all.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        kinds.setdefault((sample.values.device, sample.values.dtype, sample.groups), []).append(index)
    for indices in kinds.values():
        batch: list[int] = []
        for index in sorted(indices, key=lambda index: samples[index].size, reverse=True):
            longest = samples[batch[0]].size if batch else 0
            if batch and (2 * samples[index].size < longest or longest * (len(batch) + 1) > _TABLE_ELEMENTS):
                yield batch
                batch = []
            batch.append(index)
        yield batch


def _count(samples: list[Sample], bins: int) -> Histograms:
    """Return the histograms, without names, of samples of one kind."""
    groups = samples[0].groups
    table = pad_sequence([sample.values for sample in samples], batch_first=True, padding_value=math.nan)
    table = table if table.dtype == torch.float64 else table.float()
    # Results are in double precision, which Metal does not have.
    wide = torch.float32 if table.device.type == "mps" else torch.float64
    # 1 for a finite element and 0 for any other: x - x is NaN for NaN and the infinities.
    finite = (table - table).add_(1).nan_to_num_(nan=0.0)

    minimum, maximum = _extremes(table, groups)
    # In units of the largest magnitude no sum overflows, and no square that matters vanishes.
    unit = torch.maximum(-minimum, maximum)
    unit = torch.where(unit > 0, unit, 1)
    scaled = _replace_nonfinite(table, 0.0).div_(unit[:, None])
    nonfinite = torch.stack([_count_nonfinite(sample.elements) for sample in samples])
    local = (finite.sum(1), scaled.sum(1), scaled.square().sum(1), scaled.abs().sqrt_().sum(1), nonfinite)
    sums = torch.stack([column.to(wide) for column in local])
    _all_reduce("sum", sums, groups)
    count, total, squares, roots, nonfinite = sums

    minimum, maximum, unit = minimum.to(wide), maximum.to(wide), unit.to(wide)
    scale = (roots / count.clamp(min=1)).square()
    scale = torch.where(scale > 0, scale, 1)
    first, last = _symlog(minimum / unit / scale), _symlog(maximum / unit / scale)
    width = torch.where(last > first, (last - first) / bins, 1)

    bucket_counts = _bucket_counts(scaled, finite, scale, first, width, bins).to(wide)
    _all_reduce("sum", bucket_counts, groups)
    steps = torch.arange(bins + 1, device=table.device, dtype=wide)
    edges = _symexp(first[:, None] + width[:, None] * steps) * (scale * unit)[:, None]
    # Rounding may carry the outer ones a little too far.
    edges = edges.clamp(minimum[:, None], maximum[:, None]).sort(dim=1).values
    edges[:, 0], edges[:, -1] = minimum, maximum
    return Histograms(
        (), minimum, maximum, count, total * unit, squares * unit.square(), nonfinite, edges, bucket_counts
    )


def _extremes(table: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest finite element of each row; 0 and 0 where there is none."""
    lowest = _replace_nonfinite(table, math.inf).amin(dim=1)
    highest = _replace_nonfinite(table, -math.inf).amax(dim=1)
    extremes = torch.stack([-lowest, highest])
    _all_reduce("max", extremes, groups)
    negated, highest = _replace_nonfinite(extremes, 0.0)
    return -negated, highest


def _bucket_counts(scaled: Tensor, weights: Tensor, scale: Tensor, first: Tensor, width: Tensor, bins: int) -> Tensor:
    """Return the sum of the weights by row and bucket; uses up ``scaled``."""
    scale, first, width = (column.to(scaled.dtype)[:, None] for column in (scale, first, width))
    bucket = _symlog(scaled.div_(scale)).sub_(first).div_(width).clamp_(0, bins - 1).long()
    return scaled.new_zeros(len(scaled), bins).scatter_add_(1, bucket, weights)


def _symlog(values: Tensor) -> Tensor:
    # Several times as fast as `log1p`, and as good here: the result is compared with widths far above its rounding.
    return values.abs().add_(1).log_().copysign_(values)


def _symexp(values: Tensor) -> Tensor:
    return values.abs().expm1_().copysign_(values)


def _replace_nonfinite(values: Tensor, by: float) -> Tensor:
    # Several times as fast as `where` with a mask.
    return torch.nan_to_num(values, nan=by, posinf=by, neginf=by)


def _count_nonfinite(elements: Tensor) -> Tensor:
    if not (elements.is_floating_point() or elements.is_complex()):
        return elements.new_zeros((), dtype=torch.int64)
    # In pieces, to be no burden on memory.
    return torch.stack([torch.count_nonzero(piece - piece) for piece in elements.split(_TABLE_ELEMENTS)]).sum()


def _all_reduce(op: Literal["sum", "max"], values: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> None:
    for group in groups:
        dist.all_reduce(values, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
