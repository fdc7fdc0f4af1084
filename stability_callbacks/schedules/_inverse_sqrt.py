"""Warm-up, then one over the square root of the step."""

from __future__ import annotations

import math

from stability_callbacks._validation import check_integer
from stability_callbacks.schedules._warmup import WarmupSchedule


class WarmupInverseSqrt(WarmupSchedule):
    r"""Linear warm-up, then decay with one over the square root of the step.

    Use it when the length of training is open: it never ends, so training can go on from any point. With step
    :math:`t`, warm-up :math:`w` and time scale :math:`\tau`:

    .. math::
        m(t) = \begin{cases} s + (1 - s)\, t / w & t < w \\
                             \sqrt{\tau / (\tau + t - w)} & t \ge w \end{cases}

    With the default :math:`\tau = w` this is :math:`\sqrt{w / t}`, the schedule of the first Transformer scaled to a
    peak of 1. It does not stop at the total, which only a share needs.

    Args:
        warmup: Length of the warm-up: steps if an integer, a share of the total if a float in [0, 1]
            (``1`` is one step, ``1.0`` all of them), rounded to the nearest step.
        total_steps: Number of steps of the whole training; overrides the one that a call brings. Only a share
            needs it.
        start: Multiplier :math:`s` at step 0, in [0, 1].
        timescale: Steps :math:`\tau` after the warm-up at which the multiplier is :math:`1/\sqrt2`, >= 1.
            ``None``: the length of the warm-up, at least 1. Give one when there is no warm-up.

    Raises:
        TypeError: If an argument is not a number of the right kind.
        ValueError: If an argument is out of bounds, or if the warm-up is longer than ``total_steps``.

    Example:
        >>> schedule = WarmupInverseSqrt(warmup=100)
        >>> [schedule(step) for step in (0, 50, 100, 400, 10_000)]
        [0.0, 0.5, 1.0, 0.5, 0.1]

    References:
        Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762.
        Zhai et al. 2021, "Scaling Vision Transformers", arXiv 2106.04560 (the time scale).
    """

    def __init__(
        self,
        warmup: int | float = 0.05,
        total_steps: int | None = None,
        start: float = 0.0,
        timescale: int | None = None,
    ) -> None:
        super().__init__(warmup, total_steps, start)
        self.timescale = None if timescale is None else check_integer("timescale", timescale, at_least=1)

    def _after_warmup(self, step: int, warmup: int, total: int | None) -> float:
        timescale = self.timescale if self.timescale is not None else max(warmup, 1)
        return math.sqrt(timescale / (timescale + step - warmup))
