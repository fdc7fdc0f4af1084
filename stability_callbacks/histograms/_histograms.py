"""What was counted, and its way to TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor


class RawHistogram(TypedDict):
    """The keyword arguments of ``SummaryWriter.add_histogram_raw`` that describe one histogram."""

    tag: str
    min: float
    max: float
    num: int
    sum: float
    sum_squares: float
    bucket_limits: list[float]
    bucket_counts: list[float]


@dataclass(frozen=True)
class Histograms:
    """Histograms of ``P`` tensors with ``B`` buckets each, as tensors on one device.

    Everything but ``nonfinite`` is of the finite elements of the sample. All are float64 (float32 on ``mps``, which
    has none), the counts too: whole numbers. A tensor without a finite element has zeros throughout.

    Attributes:
        names: The ``P`` names.
        minimum: Smallest element, ``[P]``.
        maximum: Largest element, ``[P]``.
        count: Number of elements counted, ``[P]``.
        sum: Their sum, ``[P]``.
        sum_squares: The sum of their squares, ``[P]``; infinite where it overflows float64.
        nonfinite: Number of NaN and infinite elements of the whole tensor, not only of the sample, ``[P]``.
        edges: Bucket ``k`` holds the elements in ``[edges[k], edges[k + 1])``, the last one ``maximum`` too;
            ascending from ``minimum`` to ``maximum``, ``[P, B + 1]``.
        bucket_counts: Number of elements by bucket, ``[P, B]``.
    """

    names: tuple[str, ...]
    minimum: Tensor
    maximum: Tensor
    count: Tensor
    sum: Tensor
    sum_squares: Tensor
    nonfinite: Tensor
    edges: Tensor
    bucket_counts: Tensor

    def to_host(self) -> Histograms:
        """Return the histograms in host memory, brought there by one transfer.

        Returns:
            Themselves where they are there already.

        Example:
            >>> from stability_callbacks.histograms import measure_histograms
            >>> measure_histograms([("w", torch.tensor([1.0, 2.0]))]).to_host().maximum
            tensor([2.], dtype=torch.float64)
        """
        if self.edges.device.type == "cpu":
            return self
        return self.unpack(self.names, self.pack().cpu())

    def pack(self) -> Tensor:
        """Return all numbers as one table with a row for each tensor, ``[P, 2 B + 7]``."""
        moments = (self.minimum, self.maximum, self.count, self.sum, self.sum_squares, self.nonfinite)
        return torch.cat([torch.stack(moments, dim=1), self.edges, self.bucket_counts], dim=1)

    @classmethod
    def unpack(cls, names: tuple[str, ...], table: Tensor) -> Histograms:
        """Return the histograms that ``pack`` made the table of."""
        bins = (table.shape[1] - 7) // 2
        moments, edges, bucket_counts = table.split([6, bins + 1, bins], dim=1)
        minimum, maximum, count, total, sum_squares, nonfinite = moments.unbind(dim=1)
        return cls(names, minimum, maximum, count, total, sum_squares, nonfinite, edges, bucket_counts)

    def raw(self) -> Iterator[RawHistogram]:
        """Yield what TensorBoard is to be given, tensor by tensor; waits for the device once, at the first.

        TensorBoard knows a bucket by its right edge. As in torch's own ``add_histogram`` an empty bucket that ends at
        the minimum comes first, so the left edge is not lost. Buckets too narrow for two different edges are merged:
        a constant tensor has a single one. A tensor without a finite element has no histogram and is left out.

        Yields:
            The keyword arguments of ``SummaryWriter.add_histogram_raw``, the step left out.

        Example:
            >>> from torch.utils.tensorboard import SummaryWriter
            >>> from stability_callbacks.histograms import measure_histograms
            >>> def add_gradient_histograms(writer: SummaryWriter, model: torch.nn.Module, step: int) -> None:
            ...     gradients = ((f"gradients/{n}", p.grad) for n, p in model.named_parameters() if p.grad is not None)
            ...     for histogram in measure_histograms(gradients).raw():
            ...         writer.add_histogram_raw(**histogram, global_step=step)
        """
        for name, row in zip(self.names, self.to_host().pack().tolist(), strict=True):
            minimum, maximum, count, total, sum_squares, _, *rest = row
            if count == 0:
                continue
            bins = len(rest) // 2
            limits, counts = _merge_empty_intervals(rest[: bins + 1], [0.0, *rest[bins + 1 :]])
            yield RawHistogram(
                tag=name,
                min=minimum,
                max=maximum,
                num=int(count),
                sum=total,
                sum_squares=sum_squares,
                bucket_limits=limits,
                bucket_counts=counts,
            )


def _merge_empty_intervals(limits: list[float], counts: list[float]) -> tuple[list[float], list[float]]:
    """Return strictly ascending limits, each with the counts of all buckets that end there."""
    merged: dict[float, float] = {}
    for limit, count in zip(limits, counts, strict=True):
        merged[limit] = merged.get(limit, 0.0) + count
    return list(merged), list(merged.values())
