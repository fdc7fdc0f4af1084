"""What rules share that learn their threshold from the total norms seen so far."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks._device_state import DeviceState
from stability_callbacks.clipping._norm_clip import norm_clip_coefficient
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import GradientNorms, Parameters, named_gradients, scale_gradients_

__all__ = ["AdaptiveNormClip"]


class AdaptiveNormClip(ClipRule):
    """A rule that clips the total norm to a threshold learned from the norms seen so far.

    A norm that is zero or not finite neither changes gradients nor enters the statistics.
    """

    linear: ClassVar[bool] = True

    def __init__(self) -> None:
        self._state = DeviceState()
        self._threshold: Tensor | None = None

    @property
    def threshold(self) -> Tensor | None:
        return self._threshold

    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state.load_state_dict(state_dict)

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norms = self.measure(pairs, norms)
        norm = norms.total
        valid = torch.isfinite(norm) & (norm > 0)
        self._threshold = self._update(norm, valid).to(norm.dtype)
        coefficient = norm_clip_coefficient(norm, self._threshold)
        scale_gradients_(pairs, coefficient)
        return ClipResult(norm, norm * coefficient, coefficient)

    @abstractmethod
    def _update(self, norm: Tensor, valid: Tensor) -> Tensor:
        """Update the statistics with a norm where it is valid, and return the threshold for this very step."""
