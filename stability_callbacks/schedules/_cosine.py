"""Warm-up, then one or several half cosines."""

from __future__ import annotations

import math

from stability_callbacks._validation import check_integer
from stability_callbacks.schedules._warmup import WarmupDecay


class WarmupCosine(WarmupDecay):
    r"""Linear warm-up, then cosine decay to ``end`` at the total.

    The usual choice for training from scratch with a known number of steps. With step :math:`t`, warm-up :math:`w`,
    total :math:`T` and :math:`c` cycles:

    .. math::
        m(t) = \begin{cases} s + (1 - s)\, t / w & t < w \\
                             e + (1 - e)\,\tfrac12\bigl(1 + \cos \pi p\bigr),\quad
                             p = c\,\frac{t - w}{T - w} \bmod 1 & w \le t < T \\
                             e & t \ge T \end{cases}

    With ``cycles`` > 1 the steps after the warm-up are split into that many half cosines of equal length. Each falls
    from 1 toward ``end``, and the first step of the next is back at 1, without a warm-up of its own. Where a boundary
    falls between two steps, the cycle begins at the point of the curve that the step has. The last cycle ends at
    ``total_steps``, at ``end``.

    Args:
        warmup: Length of the warm-up: steps if an integer, a share of the total if a float in [0, 1]
            (``1`` is one step, ``1.0`` all of them), rounded to the nearest step.
        total_steps: Number of steps of the whole training; overrides the one that a call brings.
        start: Multiplier :math:`s` at step 0, in [0, 1].
        end: Multiplier :math:`e` from step ``total_steps`` on, in [0, 1].
        cycles: Number of half cosines, one more than the number of restarts, >= 1.

    Raises:
        TypeError: If an argument is not a number of the right kind.
        ValueError: If an argument is out of bounds, or if the warm-up is longer than ``total_steps``.

    Example:
        >>> schedule = WarmupCosine(warmup=2)
        >>> [round(schedule(step, total_steps=6), 3) for step in range(8)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
        >>> restarts = WarmupCosine(warmup=0, total_steps=6, cycles=2)
        >>> [round(restarts(step), 3) for step in range(7)]
        [1.0, 0.75, 0.25, 1.0, 0.75, 0.25, 0.0]

    References:
        Loshchilov & Hutter 2016, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983.
    """

    def __init__(
        self,
        warmup: int | float = 0.05,
        total_steps: int | None = None,
        start: float = 0.0,
        end: float = 0.0,
        cycles: int = 1,
    ) -> None:
        super().__init__(warmup, total_steps, start, end)
        self.cycles = check_integer("cycles", cycles, at_least=1)

    def _decayed(self, step: int, warmup: int, total: int) -> float:
        # The remainder in integers: 49 * (1 / 49) is less than 1, and the restart would come a step late.
        phase = self.cycles * (step - warmup) % (total - warmup) / (total - warmup)
        return (1.0 - math.cos(math.pi * phase)) / 2.0
