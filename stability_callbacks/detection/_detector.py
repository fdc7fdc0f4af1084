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
        loss: The loss of the step (the mean over its micro-batches), 0-dim; None where it was not seen.
        gradients: The norms of its raw gradients.
        spoiled_buffers: For each floating-point buffer whether its values became non-finite in this step, shape
            ``[B]``; None where buffers are not watched.
    """

    loss: Tensor | None
    gradients: GradientNorms
    spoiled_buffers: Tensor | None = None


class Detector(ABC):
    """Looks at the evidence of one step and votes for or against it, without waiting for the device.

    Attributes:
        kind: The kind of incident it finds, one word.
    """

    kind: ClassVar[str]

    def __repr__(self) -> str:
        # Checkpoints find a callback's state by its policies' representation, so it must not hold an address.
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def __call__(self, evidence: StepEvidence) -> Tensor:
        """Vote on a step.

        Args:
            evidence: What is known of the step.

        Returns:
            A 0-dim boolean on the gradients' device: True if the step must be skipped.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the detector remembers; empty for a detector without memory."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`."""
