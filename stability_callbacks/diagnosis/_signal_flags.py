"""What the numbers of a signal report mean."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from enum import Enum
from itertools import accumulate

from stability_callbacks.diagnosis._signal_kinds import (
    DEAD,
    DETACHED,
    EXPLODING_BACKWARD,
    EXPLODING_FORWARD,
    NON_FINITE,
    SILENT,
    UNUSED,
    VANISHING_BACKWARD,
    VANISHING_FORWARD,
)
from stability_callbacks.diagnosis._signal_report import SignalRow

__all__ = ["flagged"]


class _Fate(Enum):
    """What became of a signal on its way."""

    ALIVE = 1
    FADED = 2
    CUT_OFF = 3


def flagged(
    rows: Sequence[SignalRow],
    *,
    input_std: float,
    input_signal: float,
    silent: Collection[str],
    vanishing: float,
    exploding: float,
) -> tuple[SignalRow, ...]:
    """Add flags to the rows of a report, which are in order of execution.

    Args:
        rows: What was measured, with the flags that this alone tells.
        input_std: Standard deviation of the first layer's input; NaN for integers.
        input_signal: The same over the batch.
        silent: Names of the layers that have no gradient only because a zero-initialised one follows, and of these.
        vanishing: See :func:`signal_report`.
        exploding: See :func:`signal_report`.
    """
    judged = [not {NON_FINITE, UNUSED, DETACHED} & set(row.flags) for row in rows]
    signals = [_counted(row.signal_std, row, ok, silent) for row, ok in zip(rows, judged, strict=True)]
    gradients = [_counted(row.output_grad_norm, row, ok, silent) for row, ok in zip(rows, judged, strict=True)]
    sizes = [_size(row) for row in rows]
    # Norms may scale a large signal down. With 1 in second place `min` lets NaN through.
    forward = _fates([min(each, 1.0) for each in (input_signal, *signals)], vanishing)[1:]
    # A gradient is small behind a large activation that a norm follows, and large behind a small one: only the product
    # tells then.
    products = [gradient * max(1.0, size) for gradient, size in zip(gradients, sizes, strict=True)]
    backward = _fates(products[::-1], vanishing)[::-1]
    last = next((gradient for gradient in reversed(gradients) if gradient > 0), math.nan)
    # Where a signal has faded to exactly zero, rectifiers cut gradients off.
    underflown = any(fate is _Fate.FADED and signal == 0 for fate, signal in zip(forward, signals, strict=True))
    flagged_rows = []
    for row, ok, gradient, size, onward, back in zip(rows, judged, gradients, sizes, forward, backward, strict=True):
        flags = []
        if ok and row.activation_std > exploding * max(1.0, input_std if math.isfinite(input_std) else 0.0):
            flags.append(EXPLODING_FORWARD)
        if gradient * min(1.0, size) > exploding * last:
            flags.append(EXPLODING_BACKWARD)
        if onward is _Fate.FADED:
            flags.append(VANISHING_FORWARD)
        zero = ok and row.name not in silent and _is_zero(row, onward, back)
        if back is _Fate.FADED or (zero and underflown):
            flags.append(VANISHING_BACKWARD)
        elif zero and onward is not _Fate.FADED:
            flags.append(DEAD)
        if row.name in silent:
            flags.append(SILENT)
        flagged_rows.append(row._replace(flags=(*row.flags, *flags)))
    return tuple(flagged_rows)


def _is_zero(row: SignalRow, onward: _Fate | None, back: _Fate | None) -> bool:
    """Whether no gradient comes to a layer, or nothing out of it, though not necessarily of its own."""
    constant = onward is _Fate.CUT_OFF and row.activation_std == 0
    return constant or back is _Fate.CUT_OFF or row.grad_norm == 0


def _counted(value: float, row: SignalRow, judged: bool, silent: Collection[str]) -> float:
    """A number of a row; NaN where it must not be judged."""
    return value if judged and not (value == 0 and row.name in silent) else math.nan


def _size(row: SignalRow) -> float:
    return row.activation_std if math.isfinite(row.activation_std) else 1.0


def _fates(values: Sequence[float], vanishing: float) -> list[_Fate | None]:
    """What became of a signal at each point of its way; None where there is no number.

    It has faded where all that follows is small in comparison with something before. A single small value is no matter:
    the signal has passed it by, as in a residual network with small branches. Exactly zero is faded, too, after values
    that have faded; after others, the signal is cut off.
    """
    places = [place for place, value in enumerate(values) if math.isfinite(value)]
    present = [values[place] for place in places]
    before = [0.0, *accumulate(present, max)]
    onward = list(accumulate(reversed(present), max))[::-1]
    fates: list[_Fate | None] = [None] * len(values)
    fate = _Fate.ALIVE
    for place, largest_before, largest_onward in zip(places, before, onward, strict=False):
        if largest_onward >= vanishing * largest_before:
            fate = _Fate.ALIVE
        elif largest_onward > 0:
            fate = _Fate.FADED
        elif fate is _Fate.ALIVE:
            fate = _Fate.CUT_OFF
        fates[place] = fate
    return fates
