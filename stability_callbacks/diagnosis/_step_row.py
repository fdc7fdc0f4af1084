"""One step of a history."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["StepRow"]


class StepRow(NamedTuple):
    """What is known of one step of one optimizer, on the host.

    Attributes:
        step: Number of the step.
        epoch: The epoch.
        batch_idx: The batch that completed the step.
        lr: Learning rate of each parameter group.
        loss: Mean loss over the step's micro-batches; NaN where it was NaN, or was not seen.
        grad_norm: Raw total gradient norm.
        grad_norm_clipped: Total norm after clipping.
        clip_coefficient: What clipping multiplied the total norm by.
        verdict: The kinds of incident for which the step was skipped; empty if the update was applied.
        loss_scale: The loss scale; None if there is no scaler.
        norms: Raw gradient norm by parameter or by layer. Those without a gradient in this step are not there.
    """

    step: int
    epoch: int
    batch_idx: int
    lr: tuple[float, ...]
    loss: float
    grad_norm: float
    grad_norm_clipped: float
    clip_coefficient: float
    verdict: tuple[str, ...]
    loss_scale: float | None
    norms: dict[str, float]

    @property
    def skipped(self) -> bool:
        """Whether the update was not applied."""
        return bool(self.verdict)
