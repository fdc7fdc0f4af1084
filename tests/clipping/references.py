"""Straightforward float64 versions of the adaptive rules, written from their papers, and what feeds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from stability_callbacks.clipping import ClipRule

BAD = (float("nan"), float("inf"), 0.0)


def series(low: float = 2.0**-10, high: float = 2.0**10, longest: int = 60) -> st.SearchStrategy[list[float]]:
    """Norms over many orders of magnitude, with zeros, NaN and infinities among them."""
    good = st.floats(low, high, width=32)
    return st.lists(st.one_of(good, good, good, st.sampled_from(BAD)), min_size=1, max_size=longest)


def feed(rule: ClipRule, norms: Sequence[float]) -> list[float]:
    """The norms that a rule leaves of a single gradient with the given norms."""
    weight = nn.Parameter(torch.zeros(2))
    clipped = []
    for norm in norms:
        weight.grad = torch.tensor([norm, 0.0])
        rule.clip_([("weight", weight)])
        clipped.append(float(weight.grad[0]))
    return clipped


def clip_to(norm: float, threshold: float) -> float:
    return norm * min(1.0, threshold / (norm + 1e-6))


def auto_clip(norms: Sequence[float], percentile: float, window: int) -> list[float]:
    history: list[float] = []
    clipped = []
    for norm in norms:
        if math.isfinite(norm) and norm > 0:
            history.append(norm)
            clipped.append(clip_to(norm, float(np.percentile(history[-window:], percentile))))
        else:
            clipped.append(norm)
    return clipped


def z_clip(
    norms: Sequence[float], alpha: float, z_threshold: float, warmup_steps: int, max_norm: float | None, mode: str
) -> list[float]:
    warmup: list[float] = []
    mean = variance = 0.0
    clipped = []
    for norm in norms:
        if not (math.isfinite(norm) and norm > 0):
            clipped.append(norm)
            continue
        target = norm
        threshold = math.inf
        if len(warmup) < warmup_steps:
            warmup.append(norm)
            mean, variance = float(np.mean(warmup)), float(np.var(warmup))
        else:
            deviation = max(math.sqrt(variance), 0.1 * mean)
            z = (norm - mean) / deviation
            if z > z_threshold:
                threshold = mean if mode == "mean" else mean + z_threshold * deviation * (z_threshold / z)
                target = threshold
            mean = alpha * mean + (1 - alpha) * target
            variance = alpha * variance + (1 - alpha) * (target - mean) ** 2
        if max_norm is not None:
            threshold = min(threshold, max_norm)
        clipped.append(clip_to(norm, threshold))
    return clipped


def outlier_clip(
    norms: Sequence[float],
    window: int,
    z_threshold: float,
    warmup_steps: int,
    first: float,
    min_threshold: float = 0.0,
    learn_steps: float = math.inf,
) -> list[float]:
    """`first` bounds the norms until there are enough to compare with."""
    history: list[float] = []
    clipped = []
    for norm in norms:
        if not (math.isfinite(norm) and norm > 0):
            clipped.append(norm)
            continue
        recent = np.array(history[-window:])
        warm = len(history) < warmup_steps
        if warm:
            threshold = first
        else:
            median = float(np.median(recent))
            deviation = max(1.4826 * float(np.median(np.abs(recent - median))), 0.2)
            threshold = math.exp(median + z_threshold * deviation)
        threshold = max(threshold, min_threshold)
        if len(history) < learn_steps:
            history.append(math.log(norm if warm else min(norm, threshold)))
        clipped.append(clip_to(norm, threshold))
    return clipped


def ada_gc(
    steps: Sequence[Sequence[float]], beta: float, ratio: float, warmup_steps: int, warmup_max_norm: float
) -> list[list[float]]:
    """Each step is the norm of each tensor's gradient."""
    tensors = len(steps[0])
    average, seen = [math.nan] * tensors, [0] * tensors
    result = []
    for norms in steps:
        total = math.sqrt(sum(norm * norm for norm in norms))
        if not math.isfinite(total):
            result.append(list(norms))
            continue
        out = []
        for i, norm in enumerate(norms):
            if norm == 0:
                out.append(0.0)
                continue
            if seen[i] < warmup_steps:
                clipped = norm * min(1.0, warmup_max_norm / (total + 1e-6))
                average[i] = clipped if seen[i] == 0 else min(average[i], clipped)
            else:
                clipped = norm * min(1.0, ratio * average[i] / norm)
                average[i] = beta * average[i] + (1 - beta) * clipped
            seen[i] += 1
            out.append(clipped)
        result.append(out)
    return result


def agc(weight: Tensor, gradient: Tensor, clip: float, eps: float) -> Tensor:
    weight, result = weight.double(), gradient.double().clone()
    if weight.dim() <= 1:
        units: list[Any] = [()]
    else:
        units = [(row,) for row in range(weight.shape[0])]
    for unit in units:
        w, g = float(weight[unit].norm()), float(result[unit].norm())
        largest = clip * max(w, eps)
        if g > largest:
            result[unit] = result[unit] * largest / max(g, 1e-6)
    return result


def assert_close(ours: Sequence[float], theirs: Sequence[float], relative: float = 1e-6) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=relative, atol=0, equal_nan=True)


Rule = Callable[[], ClipRule]
