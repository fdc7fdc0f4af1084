"""Whether the loss is back where it was before: evidence against a state of training that looks sound."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import Any

__all__ = ["LossLevel"]

_REMEMBERED = 65
_LEAST_HISTORY = 16
_OF_A_LEVEL = 5
_THRESHOLD = 4.0
_FLOOR = 0.02

# Standard deviation of a normal distribution over the median absolute difference of two of its values.
_DEVIATION_PER_DIFFERENCE = 1.4826 / math.sqrt(2)

# That of a median over that of a mean.
_OF_A_MEDIAN = math.sqrt(math.pi / 2)


class LossLevel:
    r"""Compares the loss with its level when it was marked last, and knows a rise from noise while it falls steeply.

    The spread of a window of losses is wide while they fall: damage that doubles the loss does not stand out from it.
    The noise from one step to the next is what it always is. With :math:`y = \log L` (:math:`y = L` where losses are
    not positive), :math:`\tilde y` the median of the last five and :math:`\tilde y_0` that when it was marked:

    .. math:: z = \frac{\tilde y - \tilde y_0}{\hat\sigma \sqrt{\pi / 2} \sqrt{2 / 5}}, \qquad
              \hat\sigma = \frac{1.4826}{\sqrt 2} \operatorname{median} |y_i - y_{i-1}|

    over the last 64 steps, with :math:`\hat\sigma \ge 0.02`; a rise is one of :math:`z > 4`. Plain numbers on the host,
    to be asked now and then: it is for what is decided once in a while, such as whether to keep a snapshot.

    Example:
        >>> level = LossLevel()
        >>> for step in range(40):
        ...     level.add(2.0 * 0.95**step + 0.02 * (step % 2))
        >>> level.mark()
        >>> for loss in (0.9, 0.91, 0.9, 0.92, 0.9):
        ...     level.add(loss)
        >>> level.has_risen()
        True
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._marked: float | None = None
        self._since = 0

    def add(self, loss: float) -> None:
        """Take in the loss of an accepted step; one that is not finite is left out."""
        if math.isfinite(loss):
            self._losses = [*self._losses[1 - _REMEMBERED :], loss]
            self._since += 1

    def mark(self) -> None:
        """Remember the level of now, by the losses since it was marked or restarted, as the one to compare with."""
        if recent := self._recent():
            self._marked = median(recent)
        self._since = 0

    def restart(self) -> None:
        """Training has gone back: the losses so far say nothing of its state now. The marked level stays."""
        self._since = 0

    def has_risen(self) -> bool:
        """Whether the losses since the last mark or restart lie above the marked level by more than noise."""
        recent = self._recent()
        if self._marked is None or len(recent) < 2 or len(self._losses) < _LEAST_HISTORY:
            return False
        now, before, losses = median(recent), self._marked, self._losses
        floor = _FLOOR
        if min(*losses, before) > 0:
            now, before, losses = math.log(now), math.log(before), [math.log(loss) for loss in losses]
        else:
            floor *= abs(before)
        differences = [abs(after - first) for first, after in pairwise(losses)]
        noise = max(_DEVIATION_PER_DIFFERENCE * median(differences), floor)
        return now - before > _THRESHOLD * noise * _OF_A_MEDIAN * math.sqrt(2 / len(recent))

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain numbers."""
        return {"losses": list(self._losses), "marked": self._marked, "since": self._since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`; what it lacks is as in a new object."""
        self._losses = list(state_dict.get("losses", ()))
        self._marked = state_dict.get("marked")
        self._since = state_dict.get("since", 0)

    def _recent(self) -> list[float]:
        number = min(self._since, _OF_A_LEVEL)
        return self._losses[-number:] if number else []
