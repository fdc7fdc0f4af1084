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

    Derive from it, give it a ``kind`` and write :meth:`__call__` to make a detector of your own. What a detector owes:

    - A vote is one 0-dim boolean on the gradients' device, found without waiting for it: no ``.item()``,
      ``float(tensor)`` or ``if tensor``. Where evidence is missing (None) it says nothing against the step.
    - Voting changes nothing. Only :meth:`update` does, once the verdict is known.
    - What later steps are compared with comes from accepted steps alone. A NaN, an infinity, a norm of zero and a step
      without gradients never enter it, accepted or not.
    - Where it remembers something, :meth:`state_dict` and :meth:`load_state_dict` hold all of it, as copies, in what
      ``torch.load(weights_only=True)`` takes, so that an interrupted run goes on bit for bit. Pickles and deep copies
      behave like the original: each optimizer gets a copy of the detector.
    - Its ``repr`` shows the settings and nothing that changes with use. That of this class shows the attributes whose
      names begin without an underscore.

    Attributes:
        kind: The kind of incident it finds, one word; register it with
            :func:`~stability_callbacks.diagnosis.register_kind` to give it a severity and a color.
        needs_inputs: Whether it votes on ``evidence.input_magnitude``, which is measured for those who ask only.
            Default False.
        compares_losses: Whether it remembers losses, so that all processes must show it the same ones. Default False.

    Example:
        A detector of your own, of losses that are a multiple of the smallest so far:

        >>> import torch
        >>> from stability_callbacks.detection import Detector, StepEvidence
        >>> from stability_callbacks.gradient_pass import measure_gradients
        >>> class FarFromBest(Detector):
        ...     kind = "far_from_best"
        ...     compares_losses = True
        ...
        ...     def __init__(self, factor=10.0):
        ...         self.factor = factor
        ...         self._best = torch.tensor(torch.inf)
        ...
        ...     def __call__(self, evidence):
        ...         device = evidence.gradients.total.device
        ...         if evidence.loss is None:
        ...             return torch.zeros((), dtype=torch.bool, device=device)
        ...         return evidence.loss.detach().to(device) > self.factor * self._best.to(device)
        ...
        ...     def update(self, evidence, accepted):
        ...         if evidence.loss is None or not evidence.gradients.names:
        ...             return
        ...         loss = evidence.loss.detach().to(accepted.device, torch.float32)
        ...         enters = accepted & torch.isfinite(loss) & (loss > 0)
        ...         best = self._best.to(accepted.device)
        ...         self._best = torch.where(enters, torch.minimum(best, loss), best)
        ...
        ...     def state_dict(self):
        ...         return {"best": self._best.clone()}
        ...
        ...     def load_state_dict(self, state_dict):
        ...         self._best = state_dict["best"].clone()
        >>> detector, weight = FarFromBest(), torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.ones(1)
        >>> for loss in (2.0, 0.5, 8.0):
        ...     step = StepEvidence(torch.tensor(loss), measure_gradients([weight]))
        ...     vote = detector(step)
        ...     detector.update(step, ~vote)
        >>> detector, vote
        (FarFromBest(factor=10.0), tensor(True))
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
        """Vote on a step; what the detector has learned stays as it is. Every detector writes this.

        Args:
            evidence: What is known of the step.

        Returns:
            A 0-dim boolean on the gradients' device: True if the step must be skipped.
        """

    def update(self, evidence: StepEvidence, accepted: Tensor) -> None:
        """Take a step into the detector's statistics, once the verdict on it is known.

        Args:
            evidence: What was voted on.
            accepted: 0-dim boolean on the gradients' device: whether the update was applied. A step that was not must
                not enter what later steps are compared with. A detector may count such steps in a row, until the next
                ordinary one.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the detector remembers; empty for a detector without memory."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`."""
