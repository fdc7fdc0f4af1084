"""Evidence of a step, made from two numbers."""

from __future__ import annotations

import torch

from stability_callbacks.detection import StepEvidence
from stability_callbacks.gradient_pass import GradientNorms


def evidence(
    loss: float | None = 1.0, norm: float = 1.0, dtype: torch.dtype = torch.float64, **more: torch.Tensor | None
) -> StepEvidence:
    """A step with the given loss and total gradient norm."""
    total = torch.tensor(norm, dtype=dtype)
    gradients = GradientNorms(names=("weight",), per_tensor=total.reshape(1), total=total, norm_type=2.0)
    return StepEvidence(None if loss is None else torch.tensor(loss, dtype=dtype), gradients, **more)
