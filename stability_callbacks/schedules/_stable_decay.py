"""Warm-up, the peak for most of training, then a short decay."""

from __future__ import annotations

import math
from typing import Literal

from stability_callbacks._validation import check_choice
from stability_callbacks.schedules._span import check_span, span_steps
from stability_callbacks.schedules._warmup import WarmupDecay

DecayShape = Literal["linear", "cosine", "1-sqrt"]

# Share of the way from 1 to the end, by the share of the decay's steps that are done.
_SHAPES = {
    "linear": lambda done: done,
    "cosine": lambda done: (1.0 - math.cos(math.pi * done)) / 2.0,
    "1-sqrt": math.sqrt,
}


class WarmupStableDecay(WarmupDecay):
    r"""Linear warm-up, constant at the peak, then a decay over the last steps (WSD, trapezoid).

    Use it when training may be prolonged, or when one long run should give models of several lengths: any
    checkpoint of the stable part can be decayed. With step :math:`t`, warm-up :math:`w`, decay :math:`d` and total
    :math:`T`:

    .. math::
        m(t) = \begin{cases} s + (1 - s)\, t / w & t < w \\
                             1 & w \le t < T - d \\
                             1 - (1 - e)\, f\bigl(\tfrac{t - (T - d)}{d}\bigr) & T - d \le t < T \\
                             e & t \ge T \end{cases}

    with :math:`f(p) = p` ("linear"), :math:`\tfrac12 (1 - \cos \pi p)` ("cosine") or :math:`\sqrt p` ("1-sqrt").

    Args:
        warmup: Length of the warm-up: steps if an integer, a share of the total if a float in [0, 1]
            (``1`` is one step, ``1.0`` all of them), rounded to the nearest step.
        total_steps: Number of steps of the whole training; overrides the one that a call brings.
        start: Multiplier :math:`s` at step 0, in [0, 1].
        end: Multiplier :math:`e` from step ``total_steps`` on, in [0, 1].
        decay: Length of the decay, as ``warmup``. What the warm-up leaves of a training that turns out too short
            bounds it. 0 drops to ``end`` at ``total_steps``.
        shape: "linear", "cosine" or "1-sqrt"; the last did best in Hägele et al.

    Raises:
        TypeError: If an argument is not a number of the right kind.
        ValueError: If an argument is out of bounds, or if warm-up and decay together are longer than the total.

    Example:
        >>> schedule = WarmupStableDecay(warmup=2, decay=4, shape="linear")
        >>> [schedule(step, total_steps=10) for step in range(11)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    References:
        Hu et al. 2024, "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
        arXiv 2404.06395.
        Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
        arXiv 2405.18392.
    """

    def __init__(
        self,
        warmup: int | float = 0.05,
        total_steps: int | None = None,
        start: float = 0.0,
        end: float = 0.0,
        decay: int | float = 0.2,
        shape: DecayShape = "1-sqrt",
    ) -> None:
        super().__init__(warmup, total_steps, start, end)
        self.decay = check_span("decay", decay)
        self.shape = check_choice("shape", shape, _SHAPES)
        self._check_fit()

    def decay_steps(self, total_steps: int | None = None) -> int:
        """Return the length of the decay.

        Args:
            total_steps: Number of steps of the whole training; the constructor's overrides it.

        Returns:
            The number of steps of the decay, at most what the warm-up leaves.

        Raises:
            ValueError: If the total is not known.

        Example:
            >>> (
            ...     WarmupStableDecay(warmup=10, decay=0.2).decay_steps(100),
            ...     WarmupStableDecay(10, decay=50).decay_steps(40),
            ... )
            (20, 30)
        """
        total = self._total(total_steps)
        return 0 if total is None else min(span_steps(self.decay, total), total - self.warmup_steps(total))

    def _decayed(self, step: int, warmup: int, total: int) -> float:
        decay = self.decay_steps(total)
        done = step - (total - decay)
        return _SHAPES[self.shape](done / decay) if done > 0 else 0.0

    def _check_fit(self) -> None:
        spans = (self.warmup, self.decay)
        if self.total_steps is None and not all(isinstance(span, float) for span in spans):
            return
        total = self.total_steps if self.total_steps is not None else 1
        # Unrounded, so that two halves fit into three steps.
        length = sum(span * total if isinstance(span, float) else span for span in spans)
        if length > total * (1 + 1e-9):
            of = "the total" if self.total_steps is None else f"`total_steps` = {total}"
            raise ValueError(
                f"`warmup` and `decay` together must be at most {of}, got warmup={self.warmup!r}, decay={self.decay!r}"
            )
