"""The detector of a loss that has risen and stays up."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks._validation import check_integer
from stability_callbacks.detection._detector import Detector, StepEvidence
from stability_callbacks.detection._spike import Spike

__all__ = ["SustainedRise"]


class SustainedRise(Detector):
    """Fires when the loss has stood out from its recent past for several steps in a row.

    One spike is a bad batch; several in a row are a model that has left its basin, which no skipped step brings back.
    Each step is judged as :class:`~stability_callbacks.detection.Spike` judges the loss; losses that stand out do not
    enter its window, so the threshold does not rise with them. A non-finite loss neither adds to the row nor ends it,
    nor does a step without gradients.

    Args:
        patience: Length of the row, >= 1. Default 5.
        window: See :class:`~stability_callbacks.detection.Spike`. Default 128.
        threshold: See there. Default 6.0.
        min_history: See there. Default 64.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.

    Example:
        >>> from stability_callbacks.gradient_pass import measure_gradients
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.ones(1)
        >>> rise, applied = SustainedRise(patience=2, window=8, min_history=4), torch.tensor(True)
        >>> for loss in (1.0, 1.1, 0.9, 1.0, 5.0, 5.0):
        ...     evidence = StepEvidence(torch.tensor(loss), measure_gradients([weight]))
        ...     fires = rise(evidence)
        ...     rise.update(evidence, applied)
        >>> fires
        tensor(True)
    """

    kind: ClassVar[str] = "sustained_rise"
    compares_losses: ClassVar[bool] = True

    def __init__(self, patience: int = 5, window: int = 128, threshold: float = 6.0, min_history: int = 64) -> None:
        self.patience = check_integer("patience", patience, at_least=1)
        self._spike = Spike(window, threshold, min_history, on="loss")
        self._row: Tensor | None = None
        self._stands_out: Tensor | None = None

    def __repr__(self) -> str:
        spike = self._spike
        return (
            f"SustainedRise(patience={self.patience}, window={spike.window}, threshold={spike.threshold:g}, "
            f"min_history={spike.min_history})"
        )

    def __call__(self, evidence: StepEvidence) -> Tensor:
        return self.judge(evidence)[0]

    def judge(self, evidence: StepEvidence) -> tuple[Tensor, Tensor]:
        """Judge a step once, both ways.

        Args:
            evidence: What is known of the step.

        Returns:
            Whether the loss has stood out for long enough, and whether that of this step does: 0-dim booleans on the
            gradients' device.
        """
        stands_out = self.stands_out(evidence)
        return self._next_row(evidence, stands_out) >= self.patience, stands_out

    def stands_out(self, evidence: StepEvidence) -> Tensor:
        """Whether the loss of a step stands out by itself.

        Args:
            evidence: What is known of the step.

        Returns:
            A 0-dim boolean on the gradients' device.
        """
        self._stands_out = self._spike(evidence)
        return self._stands_out

    @torch.no_grad()
    def update(self, evidence: StepEvidence, accepted: Tensor) -> None:
        stands_out = self._spike(evidence) if self._stands_out is None else self._stands_out
        self._stands_out = None
        if not evidence.gradients.names:
            return
        self._row = self._next_row(evidence, stands_out)
        self._spike.update(evidence, accepted & ~stands_out)

    def state_dict(self) -> dict[str, Any]:
        return {"spike": self._spike.state_dict(), "row": None if self._row is None else self._row.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._spike.load_state_dict(state_dict.get("spike", {}))
        row = state_dict.get("row")
        self._row = None if row is None else row.clone()
        self._stands_out = None

    def _next_row(self, evidence: StepEvidence, stands_out: Tensor) -> Tensor:
        row = torch.zeros_like(stands_out, dtype=torch.int64) if self._row is None else self._row.to(stands_out.device)
        if evidence.loss is None:
            return row
        judged = torch.isfinite(evidence.loss.to(stands_out.device))
        return torch.where(judged, torch.where(stands_out, row + 1, 0), row)
