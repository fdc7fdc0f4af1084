"""What rules with statistics share: state that lies on the gradients' device, and goes into checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks.clipping._norm_clip import norm_clip_coefficient
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import GradientNorms, Parameters, named_gradients, scale_gradients_

__all__ = ["AdaptiveNormClip", "DeviceState"]


class DeviceState:
    """Named tensors that live where the gradients do, from the first time they are asked for.

    They are float64 (float32 on ``mps``, which has none), so that statistics over many steps do not drift.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def on(self, device: torch.device, **initial: float) -> list[Tensor]:
        """The tensors of the given names, in order, made as 0-dim tensors of the given values at first."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, value in initial.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                self._tensors[name] = torch.full((), value, dtype=dtype, device=device)
            elif tensor.device != device:
                self._tensors[name] = tensor.to(device)
        return [self._tensors[name] for name in initial]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        return {name: tensor.clone() for name, tensor in self._tensors.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over copies of all tensors; they move to the gradients' device when they are used."""
        self._tensors = {name: tensor.clone() for name, tensor in state_dict.items()}


class AdaptiveNormClip(ClipRule):
    """A rule that clips the total norm to a threshold learnt from the norms seen so far.

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
        self._threshold = self._learn(norm, valid).to(norm.dtype)
        coefficient = norm_clip_coefficient(norm, self._threshold)
        scale_gradients_(pairs, coefficient)
        return ClipResult(norm, norm * coefficient, coefficient)

    @abstractmethod
    def _learn(self, norm: Tensor, valid: Tensor) -> Tensor:
        """Update the statistics with a norm where it is valid, and return the threshold for this very step."""
