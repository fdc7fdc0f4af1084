"""The detector of NaN and infinity."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stability_callbacks.detection._detector import Detector, StepEvidence

__all__ = ["NonFinite"]


class NonFinite(Detector):
    """Votes against a step whose loss, gradients or floating-point buffers hold NaN or infinity.

    Weights never recover from one non-finite update, and neither do the running statistics of a normalization layer
    from one non-finite batch, so this detector belongs into every run. The gradients are judged by their norm, which
    is measured anyway. A buffer that was non-finite before the step (an attention mask of minus infinities) is no
    evidence against it.

    Example:
        >>> from stability_callbacks.gradient_pass import measure_gradients
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.ones(2)
        >>> gradients = measure_gradients([weight])
        >>> bool(NonFinite()(StepEvidence(loss=torch.tensor(float("nan")), gradients=gradients)))
        True
    """

    kind: ClassVar[str] = "nonfinite"

    def __call__(self, evidence: StepEvidence) -> Tensor:
        bad = ~evidence.gradients.finite
        if evidence.loss is not None:
            bad = bad | ~torch.isfinite(evidence.loss).all().to(bad.device)
        if evidence.nonfinite_buffers is not None:
            bad = bad | evidence.nonfinite_buffers.any().to(bad.device)
        return bad
