"""The detector of losses and gradients that stand out from their recent past."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks._device_state import DeviceState
from stability_callbacks._validation import check_choice, check_integer, check_number
from stability_callbacks.detection._detector import Detector, StepEvidence

__all__ = ["Spike"]

# Median absolute deviations in a standard deviation, for normally distributed values.
_DEVIATION_PER_MAD = 1.4826

# Each watched series, and the least scale its values are measured by; see the class.
_FLOORS = {"loss": 0.02, "grad_norm": 0.2}


class Spike(Detector):
    r"""Votes against a step whose loss or gradient norm stands out upwards from those of the last accepted steps.

    Use it where a rare bad batch throws a long run back, as in language-model pretraining. It is not for a run
    whose losses lie near zero at a small batch size: they span decades there, and so does its threshold.

    Each series has a robust z-score, and one above the threshold is enough:

    .. math:: z = \frac{y - \operatorname{median}(y_i)}
                       {\max\big(1.4826 \operatorname{median} |y_i - \operatorname{median}(y_i)|, \; f\big)}

    over the ``window`` last values of accepted steps, with :math:`y = \log \lVert g \rVert` and :math:`f = 0.2` for the
    total gradient norm, and :math:`y = \log L` and :math:`f = 0.02` for the loss; while a negative loss is in the
    window, :math:`y = L` and :math:`f = 0.02 \, |\operatorname{median}(L_i)|`.

    - The logarithm keeps losses near zero from false alarms. They are so skewed that the plain z-score of the loss
      exceeds 6 in up to 7 % of the steps of a sound run (classifiers, batch size 16). Where losses lie closely
      together, both scores agree.
    - The floors :math:`f` keep a window of nearly equal values from firing on noise: with the default threshold a loss
      of up to 1.12 times its median and a norm of up to 3.3 times never fire. With a floor of 0.1 for the norm the
      ordinary bumps of small Transformers did.
    - In 40 sound runs of small networks (70,400 steps; MLP, CNN, LSTM, Transformer; SGD and Adam; batch size 16 up to
      the whole data set; rates constant, dropped, cosine, restarted) the loss fired 9 times and the norm 9 times: 15
      of these in bursts of a likelihood with a learned variance, 3 in gradient descent over the whole data set. The
      plain z-score of the loss would have fired 850 times.

    A skipped step never enters the window, nor does a NaN, an infinity, a norm of zero, or a step without gradients,
    and none of them counts as a spike: that is for
    :class:`~stability_callbacks.detection.NonFinite` to judge. So a lasting jump upwards, as of a new data set, is
    skipped until the guard stops the run; slow drifts, and falls of any size, are followed. A series is silent until it
    has ``min_history`` values, in a step where it was not seen, and while half its window or more is zero.

    Args:
        window: Number of accepted steps remembered, >= 2. Default 128.
        threshold: z-score above which a value is a spike, > 0. Default 6.0.
        min_history: Number of values from which a series is judged, from 2 to ``window``. Default 64.
        on: What is watched: ``"loss"``, ``"grad_norm"`` or ``"both"`` (default).

    Raises:
        TypeError: If a number is not one.
        ValueError: If an argument is out of its range.

    Example:
        >>> from stability_callbacks.gradient_pass import measure_gradients
        >>> weight, accepted = torch.nn.Parameter(torch.zeros(1)), torch.tensor(True)
        >>> weight.grad = torch.ones(1)
        >>> spike = Spike(window=8, min_history=4, on="loss")
        >>> for loss in (2.0, 2.1, 1.9, 2.0):
        ...     spike.update(StepEvidence(torch.tensor(loss), measure_gradients([weight])), accepted)
        >>> spike(StepEvidence(torch.tensor(4.0), measure_gradients([weight])))
        tensor(True)

    References:
        Chowdhery et al.: PaLM (2022), arXiv 2204.02311: loss spikes, and skipping the batches that made them.
        OLMo-core's ``SkipStepOptimizer``: six standard deviations over 128 steps, on loss and gradient norm.
    """

    kind: ClassVar[str] = "spike"
    compares_losses: ClassVar[bool] = True

    def __init__(self, window: int = 128, threshold: float = 6.0, min_history: int = 64, on: str = "both") -> None:
        self.window = check_integer("window", window, at_least=2)
        self.threshold = check_number("threshold", threshold, above=0)
        self.min_history = check_integer("min_history", min_history, at_least=2, at_most=self.window)
        self.on = check_choice("on", on, ("loss", "grad_norm", "both"))
        self._series = tuple(_FLOORS) if self.on == "both" else (self.on,)
        self._state = DeviceState()

    def __call__(self, evidence: StepEvidence) -> Tensor:
        return (self.z_scores(evidence) > self.threshold).any()

    @torch.no_grad()
    def z_scores(self, evidence: StepEvidence) -> Tensor:
        """How far a step stands out, in robust standard deviations; what the detector has learned stays as it is.

        Args:
            evidence: What is known of the step.

        Returns:
            Shape ``[S]``, on the gradients' device: the score of the loss and of the gradient norm, or of the one that
            is watched. NaN where there is nothing to compare, or too little to compare with.
        """
        history, count = self._memory(evidence.gradients.total.device)
        value = self._values(evidence, history)
        # Values compare by their ratio, so by logarithm, unless negative ones are among them.
        signed = (history < 0).any(dim=1, keepdim=True)
        history = torch.where(signed, history, history.log())
        value = torch.where(signed, value, value.log())

        count = count.clamp(max=self.window)
        middle = torch.cat([count - 1, count], dim=1).clamp(min=0) // 2
        median = _median(history, middle)
        deviation = _DEVIATION_PER_MAD * _median((history - median).abs(), middle)
        unit = torch.where(signed, median.abs(), 1.0)
        floor = torch.stack([_FLOORS[name] * row for name, row in zip(self._series, unit, strict=True)])
        scale = torch.maximum(deviation, floor)
        known = (count >= self.min_history) & (scale > 0)
        return torch.where(known, (value - median) / scale, float("nan")).squeeze(1)

    @torch.no_grad()
    def update(self, evidence: StepEvidence, accepted: Tensor) -> None:
        if not evidence.gradients.names:
            return
        history, count = self._memory(evidence.gradients.total.device)
        value = self._values(evidence, history)
        enters = accepted.to(value.device) & ~value.isnan()
        position = count % self.window
        history.scatter_(1, position, torch.where(enters, value, history.gather(1, position)))
        count.add_(enters)

    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`.

        Raises:
            ValueError: If it comes from a detector with another window or other series.
        """
        shape = (len(self._series), self.window)
        if state_dict and tuple(state_dict["history"].shape) != shape:
            raise ValueError(
                f"the state holds a history of shape {tuple(state_dict['history'].shape)}, but {self!r} keeps one of "
                f"shape {shape}; load it into a detector with the `window` and `on` it was saved with"
            )
        self._state.load_state_dict(state_dict)

    def _memory(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The last values of each series, ``[S, window]``, and how many it has taken in so far, ``[S, 1]``."""
        rows = len(self._series)
        [history] = self._state.on(device, shape=(rows, self.window), history=float("nan"))
        [count] = self._state.on(device, shape=(rows, 1), dtype=torch.int64, count=0)
        return history, count

    def _values(self, evidence: StepEvidence, history: Tensor) -> Tensor:
        """What a step adds to each series, ``[S, 1]``; NaN for what must neither vote nor enter."""
        norm, loss = evidence.gradients.total, evidence.loss
        unknown = torch.full_like(norm, float("nan"))
        seen = {"loss": unknown if loss is None else loss, "grad_norm": torch.where(norm > 0, norm, unknown)}
        column = torch.stack([seen[name].to(history.device, history.dtype).reshape(1) for name in self._series])
        return torch.where(torch.isfinite(column), column, float("nan"))


def _median(values: Tensor, middle: Tensor) -> Tensor:
    """Median of each row, given the places of its two middle values once it is sorted, NaN last; ``[S, 1]``."""
    # `Tensor.nanmedian` takes the lower of the two and has no deterministic version on CUDA; `nanquantile` takes five
    # times as long.
    return values.sort(dim=1).values.gather(1, middle).mean(dim=1, keepdim=True)
