"""When a gradient counts as vanished or exploded."""

from __future__ import annotations

from typing import Literal

from recipes.gradient_flow._measurement import Measurement

__all__ = [
    "EXPLODING_LEVEL",
    "EXPLODING_RATIO",
    "RULE",
    "VANISHING_LEVEL",
    "VANISHING_RATIO",
    "VERDICTS",
    "Verdict",
    "verdict",
]

Verdict = Literal["vanishing", "exploding", "sound"]
VERDICTS: tuple[Verdict, ...] = ("vanishing", "exploding", "sound")

# With a cross-entropy of ten classes, a sound network of any depth has norms of 0.1 to 10.
VANISHING_LEVEL, VANISHING_RATIO = 1e-4, 1e-3
EXPLODING_LEVEL, EXPLODING_RATIO = 100.0, 30.0

RULE = (
    f"exploding if a norm is not finite or above {EXPLODING_LEVEL:g}; vanishing if the first layer's norm is below"
    f" {VANISHING_LEVEL:g}; else by the ratio of the first layer's to the last one's, exploding above"
    f" {EXPLODING_RATIO:g} and vanishing below {VANISHING_RATIO:g}; else sound"
)


def verdict(measurement: Measurement) -> Verdict:
    """Judge by the size of the gradients *and* by the ratio of the first layer's to the last one's.

    The ratio alone is a bad detector: where the signal dies on its way forward, the gradients of all layers are tiny
    and their ratio is near 1, or 0/0. The thresholds are conventions; :data:`RULE` has them in words.

    Example:
        >>> verdict(Measurement((1e-15, 2e-15, 1e-15), (1.0, 1e-8, 1e-15)))
        'vanishing'
        >>> verdict(Measurement((0.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
        'vanishing'
        >>> verdict(Measurement((2.0, 3.0, 1.0), (1.0, 1.0, 1.0)))
        'sound'
    """
    if not all(norm <= EXPLODING_LEVEL for norm in measurement.gradient_norms):  # NaN is not
        return "exploding"
    if measurement.first < VANISHING_LEVEL:
        return "vanishing"
    if measurement.ratio > EXPLODING_RATIO:
        return "exploding"
    return "vanishing" if measurement.ratio < VANISHING_RATIO else "sound"
