"""Histograms of many tensors, counted on their device without waiting for it."""

from __future__ import annotations

from stability_callbacks.histograms._histograms import Histograms, RawHistogram
from stability_callbacks.histograms._measure import measure_histograms

__all__ = ["Histograms", "RawHistogram", "measure_histograms"]
