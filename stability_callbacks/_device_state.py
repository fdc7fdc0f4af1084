"""State that lies on the gradients' device, and goes into checkpoints: what clip rules and detectors remember."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DeviceState"]


class DeviceState:
    """Named tensors that live where the gradients do, from the first time they are asked for.

    Statistics are float64 (float32 on ``mps``, which has none), so that they do not drift over many steps.

    Example:
        >>> state = DeviceState()
        >>> mean, variance = state.on(torch.device("cpu"), mean=0, variance=1)
        >>> [history] = state.on(torch.device("cpu"), shape=(3,), history=float("nan"))
        >>> [count] = state.on(torch.device("cpu"), dtype=torch.int64, count=0)
        >>> _ = count.add_(1)
        >>> state.state_dict()["count"]
        tensor(1)
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def on(
        self, device: torch.device, shape: Sequence[int] = (), dtype: torch.dtype | None = None, **initial: float
    ) -> list[Tensor]:
        """The tensors of the given names, in order; at first they are filled with the given values.

        Args:
            device: Where they are needed; those that lie elsewhere move there.
            shape: Their shape where they have to be made. Default: 0-dim.
            dtype: Their type. Default: that of statistics.
            **initial: Name and first value of each.

        Returns:
            The tensors themselves, to be written to in place.
        """
        if dtype is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, value in initial.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                self._tensors[name] = torch.full(tuple(shape), value, dtype=dtype, device=device)
            elif tensor.device != device:
                self._tensors[name] = tensor.to(device, dtype)
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
