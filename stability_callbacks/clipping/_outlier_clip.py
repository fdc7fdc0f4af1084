"""Clipping of norms that stand out from those of the run's own steps, and of no others."""

from __future__ import annotations

import torch
from torch import Tensor

from stability_callbacks._validation import check_integer, check_number
from stability_callbacks.clipping._adaptive import AdaptiveNormClip
from stability_callbacks.clipping._rule import ClipResult
from stability_callbacks.gradient_pass import GradientNorms, Parameters, combine_norms, named_gradients, tensor_norms

__all__ = ["OutlierClip"]

# Median absolute deviations in a standard deviation, for normally distributed values.
_DEVIATION_PER_MAD = 1.4826

# Least standard deviation of the logarithm: norms that lie closer together than that still fluctuate.
_LEAST_DEVIATION = 0.2

# Weights that start near zero count for this.
_LEAST_WEIGHT_NORM = 1.0


class OutlierClip(AdaptiveNormClip):
    r"""Clip the total norm only where it stands out from the norms of the run's last steps; leave all others alone.

    The rule for a run that you know nothing of: it bounds what explodes, and does not slow what is sound, in whatever
    units the loss is and at whatever rate it is learned. It cures no learning rate that is too high: where ordinary
    steps must be clipped, as in many recurrent networks, take :class:`~stability_callbacks.clipping.NormClip`.

    .. math:: \tau = \max\Big(\text{min\_threshold}, \;
                     \exp\big(m + z_t \max(1.4826 \operatorname{median} |y_i - m|, \; 0.2)\big)\Big), \qquad
              m = \operatorname{median}(y_i), \qquad
              g \leftarrow g \cdot \min\Big(1, \frac{\tau}{\lVert g \rVert + 10^{-6}}\Big)

    over the logarithms :math:`y_i` of the last ``window`` norms, each as the rule left it, without the current one.

    - The logarithm and the robust scale follow norms that fall or rise steadily by orders of magnitude, and norms that
      are spread over decades, as those of small batches near a loss of zero. The least scale of 0.2 leaves every norm
      up to 2.7 times the median alone.
    - A lasting jump is clipped for at most half a window before the median and the scale follow it; a jump by a factor
      of a thousand is followed in less than two windows.
    - In the first ``warmup_steps`` there is nothing to compare with, and the weights give the scale:
      :math:`\tau = \max(\text{min\_threshold}, \; \text{warmup\_ratio} \cdot \max(\lVert w \rVert, 1))` with the norm
      of all weights at the first step. An explosion at the start is bounded; norms of a sound start lie far below.
      What is then learned are the norms before clipping, so a run in large units is free after the warm-up.

    Zero and non-finite norms are left out of everything.

    Args:
        window: Number of norms remembered, >= 2. Default 128.
        z_threshold: Robust z-score of the norm's logarithm above which it is an outlier, > 0. Default 5.0.
        warmup_steps: Number of norms from which they are judged by each other, from 2 to ``window``. Default 16.
        warmup_ratio: Largest ratio of gradient to weight norm before that, > 0. Default 1.0.
        min_threshold: Norms up to this are never clipped, >= 0. Default 0.0.
        learn_steps: Number of norms after which the threshold stays as it is, at least ``warmup_steps``; None: it
            follows the run for ever. With a number the rule is ``NormClip`` at a threshold in the units of the run's
            start. Default None.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.

    Example:
        >>> rule = OutlierClip(warmup_steps=4)
        >>> weight = torch.nn.Parameter(torch.full((1,), 9.0))
        >>> for norm in (2.0, 1.0, 2.0, 3.0, 2.5, 200.0):
        ...     weight.grad = torch.tensor([norm])
        ...     _ = rule.clip_([weight])
        >>> weight.grad
        tensor([10.4574])

    References:
        The robust z-score is that of :class:`~stability_callbacks.detection.Spike`.
        Kumar et al.: ZClip (2025), arXiv 2504.02507, whose mean and variance are neither robust nor free of the scale.
    """

    def __init__(
        self,
        window: int = 128,
        z_threshold: float = 5.0,
        warmup_steps: int = 16,
        warmup_ratio: float = 1.0,
        min_threshold: float = 0.0,
        learn_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.window = check_integer("window", window, at_least=2)
        self.z_threshold = check_number("z_threshold", z_threshold, above=0)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, at_least=2, at_most=self.window)
        self.warmup_ratio = check_number("warmup_ratio", warmup_ratio, above=0)
        self.min_threshold = check_number("min_threshold", min_threshold, at_least=0)
        self.learn_steps = (
            None if learn_steps is None else check_integer("learn_steps", learn_steps, at_least=self.warmup_steps)
        )

    def __repr__(self) -> str:
        return (
            f"OutlierClip(window={self.window}, z_threshold={self.z_threshold:g}, warmup_steps={self.warmup_steps}, "
            f"warmup_ratio={self.warmup_ratio:g}, min_threshold={self.min_threshold:g}, learn_steps={self.learn_steps})"
        )

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take up a state from :meth:`state_dict`.

        Raises:
            ValueError: If it comes from a rule with another window.
        """
        if state_dict and len(state_dict["history"]) != self.window:
            raise ValueError(
                f"the state holds {len(state_dict['history'])} norms, but {self!r} keeps {self.window}; load it into a "
                f"rule with the `window` it was saved with"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        if pairs and "weight_norm" not in self._state:  # measured once, so known at every later step without a branch
            norm = combine_norms(tensor_norms([parameter.detach() for _, parameter in pairs]))
            self._state["weight_norm"] = torch.where(torch.isfinite(norm), norm, float("inf"))
        return super().clip_(pairs, norms)

    def _update(self, norm: Tensor, valid: Tensor) -> Tensor:
        if "weight_norm" not in self._state:  # there was no gradient yet
            return torch.full_like(norm, float("inf"))
        device = norm.device
        [weight_norm] = self._state.on(device, weight_norm=0)
        [count] = self._state.on(device, dtype=torch.int64, count=0)
        [history] = self._state.on(device, shape=(self.window,), history=float("nan"))
        warm = count < self.warmup_steps
        threshold = torch.where(
            warm, self.warmup_ratio * weight_norm.clamp(min=_LEAST_WEIGHT_NORM), self._bound(history, count)
        ).clamp(min=self.min_threshold)

        value = torch.where(warm, norm, torch.minimum(norm.to(threshold.dtype), threshold)).log()
        enters = valid if self.learn_steps is None else valid & (count < self.learn_steps)
        position = (count % self.window).reshape(1)
        history.index_copy_(0, position, torch.where(enters, value, history[position]).to(history.dtype))
        count.add_(enters)
        return threshold

    def _bound(self, history: Tensor, count: Tensor) -> Tensor:
        """The norm whose logarithm has the largest z-score allowed; NaN while nothing is known."""
        known = count.clamp(max=self.window).reshape(1)
        middle = torch.cat([known - 1, known]).clamp(min=0) // 2
        median = _median(history, middle)
        deviation = (_DEVIATION_PER_MAD * _median((history - median).abs(), middle)).clamp(min=_LEAST_DEVIATION)
        return (median + self.z_threshold * deviation).exp()


def _median(values: Tensor, middle: Tensor) -> Tensor:
    """Median, given the places of the two middle values once they are sorted, NaN last."""
    return values.sort().values[middle].mean()
