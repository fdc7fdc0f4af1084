"""Clipping to a percentile of the norms seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from stability_callbacks._validation import check_integer, check_number
from stability_callbacks.clipping._adaptive import AdaptiveNormClip

__all__ = ["AutoClip"]


class AutoClip(AdaptiveNormClip):
    r"""Clip the total norm to a percentile of the norms of recent steps: no threshold to tune.

    Use it where a good ``max_norm`` is unknown or drifts. With the default, nine steps in ten are clipped: it works as
    a normalization of the gradient, so the learning rate may need to rise.

    .. math:: g \leftarrow g \cdot \min\Big(1, \frac{P_p(\lVert g_1 \rVert, \dots, \lVert g_t \rVert)}
                                                   {\lVert g_t \rVert + 10^{-6}}\Big)

    The percentile is interpolated linearly, as by ``numpy.percentile``, and includes the current norm. Unlike the
    published code the history is bounded, and a zero or non-finite norm never enters it.

    Args:
        percentile: Between 0 and 100. Default 10.
        window: Number of norms remembered, >= 1. Default 10,000.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.

    Example:
        >>> rule = AutoClip(percentile=10)
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> for norm in (1.0, 2.0, 3.0, 100.0):
        ...     weight.grad = torch.tensor([norm])
        ...     _ = rule.clip_([weight])
        ...     print(f"{rule.threshold:.1f}")
        1.0
        1.1
        1.2
        1.3

    References:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip (2020), arXiv 2007.14469.
    """

    def __init__(self, percentile: float = 10, window: int = 10_000) -> None:
        super().__init__()
        self.percentile = check_number("percentile", percentile, at_least=0, at_most=100)
        self.window = check_integer("window", window, at_least=1)

    def __repr__(self) -> str:
        return f"AutoClip(percentile={self.percentile:g}, window={self.window})"

    def _update(self, norm: Tensor, valid: Tensor) -> Tensor:
        [position] = self._state.on(norm.device, position=0)
        if "history" not in self._state:
            self._state["history"] = position.new_full((self.window,), float("nan"))
        self._state["history"] = history = self._state["history"].to(norm.device)
        index = position.long().reshape(1)
        history.index_copy_(0, index, torch.where(valid, norm, history[index]).reshape(1).to(history.dtype))
        position.copy_((position + valid) % self.window)
        threshold = torch.nanquantile(history, self.percentile / 100)
        # Nothing seen yet: nothing to clip to.
        return torch.where(torch.isnan(threshold), float("inf"), threshold)
