"""What every detector is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from stability_callbacks.gradient_pass import GradientNorms

__all__ = ["Detector", "StepEvidence"]


class StepEvidence(NamedTuple):
    """What is known of a step before its update is applied.

    Attributes:
        loss: The loss of the step (the mean over its micro-batches, and over all processes if a detector compares
            losses), 0-dim; None where it was not seen.
        gradients: The norms of its raw gradients.
        nonfinite_buffers: For each floating-point buffer whether its values became non-finite in this step, shape
            ``[B]``; None where buffers are not watched.
        input_magnitude: The largest absolute value in the inputs of all its micro-batches, 0-dim, see
            :func:`~stability_callbacks.detection.input_magnitude`; None where it was not measured, or nothing was there
            to measure.
    """

    loss: Tensor | None
    gradients: GradientNorms
    nonfinite_buffers: Tensor | None = None
    input_magnitude: Tensor | None = None


class Detector(ABC):
    """Looks at the evidence of one step and votes for or against it, without waiting for the device.

    A detector that learns from the steps it sees serves one optimizer.

    Attributes:
        kind: The kind of incident it finds, one word.
        needs_inputs: Whether it votes on ``evidence.input_magnitude``, which is measured for those who ask only.
        compares_losses: Whether it remembers losses, so that all processes must show it the same ones.
    """

    kind: ClassVar[str]
    needs_inputs: ClassVar[bool] = False
    compares_losses: ClassVar[bool] = False

    def __repr__(self) -> str:
        # Checkpoints find a callback's state by its policies' representation, so it must not hold an address.
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def __call__(self, evidence: StepEvidence) -> Tensor:
        """Vote on a step; what the detector has learned stays as it is.

        Args:
            evidence: What is known of the step.

        Returns:
            A 0-dim boolean on the gradients' device: True if the step must be skipped.
        """

    def update(self, evidence: StepEvidence, accepted: Tensor) -> None:
        """Take a step into the detector's statistics, once the verdict on it is known.

        Args:
            evidence: What was voted on.
            accepted: 0-dim boolean on the gradients' device: whether the update was applied. A step that was not
                must leave no trace.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the detector remembers; empty for a detector without memory."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`."""
