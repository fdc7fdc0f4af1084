"""Warm-up, then the peak for good."""

from __future__ import annotations

from stability_callbacks.schedules._warmup import WarmupSchedule


class WarmupConstant(WarmupSchedule):
    r"""Linear warm-up, then constant at the peak.

    Use it when another scheduler (``ReduceLROnPlateau``, say) does the decay, or when the length of training
    is open. With step :math:`t` and warm-up :math:`w`:

    .. math::
        m(t) = \begin{cases} s + (1 - s)\, t / w & t < w \\ 1 & t \ge w \end{cases}

    Args:
        warmup: Length of the warm-up: steps if an integer, a share of the total if a float in [0, 1]
            (``1`` is one step, ``1.0`` all of them), rounded to the nearest step.
        total_steps: Number of steps of the whole training; overrides the one that a call brings. Only a share
            needs it.
        start: Multiplier :math:`s` at step 0, in [0, 1].

    Raises:
        TypeError: If an argument is not a number of the right kind.
        ValueError: If an argument is out of bounds, or if the warm-up is longer than ``total_steps``.

    Example:
        >>> schedule = WarmupConstant(warmup=4)
        >>> [schedule(step) for step in (0, 1, 2, 4, 1_000_000)]
        [0.0, 0.25, 0.5, 1.0, 1.0]
        >>> schedule.needs_total
        False

    References:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv 1706.02677.
    """

    def __init__(self, warmup: int | float = 0.05, total_steps: int | None = None, start: float = 0.0) -> None:
        super().__init__(warmup, total_steps, start)

    def _after_warmup(self, step: int, warmup: int, total: int | None) -> float:
        return 1.0
