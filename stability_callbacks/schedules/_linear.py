"""Warm-up, then a straight line to the end."""

from __future__ import annotations

from stability_callbacks.schedules._warmup import WarmupDecay


class WarmupLinear(WarmupDecay):
    r"""Linear warm-up, then linear decay to ``end`` at the total.

    Use it when fine-tuning, and wherever the length of training is fixed: decaying linearly to zero is hard to
    beat. With step :math:`t`, warm-up :math:`w` and total :math:`T`:

    .. math::
        m(t) = \begin{cases} s + (1 - s)\, t / w & t < w \\
                             1 - (1 - e)\,\frac{t - w}{T - w} & w \le t < T \\
                             e & t \ge T \end{cases}

    Args:
        warmup: Length of the warm-up: steps if an integer, a share of the total if a float in [0, 1]
            (``1`` is one step, ``1.0`` all of them), rounded to the nearest step.
        total_steps: Number of steps of the whole training; overrides the one that a call brings.
        start: Multiplier :math:`s` at step 0, in [0, 1].
        end: Multiplier :math:`e` from step ``total_steps`` on, in [0, 1].

    Raises:
        TypeError: If an argument is not a number of the right kind.
        ValueError: If an argument is out of bounds, or if the warm-up is longer than ``total_steps``.

    Example:
        >>> schedule = WarmupLinear(warmup=2)
        >>> [schedule(step, total_steps=6) for step in range(8)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    References:
        Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805.
        Defazio et al. 2023, "Optimal Linear Decay Learning Rate Schedules and Further Refinements", arXiv 2310.07831.
    """

    def __init__(
        self, warmup: int | float = 0.05, total_steps: int | None = None, start: float = 0.0, end: float = 0.0
    ) -> None:
        super().__init__(warmup, total_steps, start, end)

    def _decayed(self, step: int, warmup: int, total: int) -> float:
        return (step - warmup) / (total - warmup)
