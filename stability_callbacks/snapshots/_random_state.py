"""The state of all random number generators that training draws from."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState"]


class RandomState(NamedTuple):
    """The global random states that a training step draws from: PyTorch on each device, NumPy, and Python.

    Take one where a step begins, and the step can be repeated with the same dropout masks. Its fields are tensors and
    plain values, so ``torch.load(..., weights_only=True)`` reads back what ``torch.save(state._asdict(), ...)`` wrote.
    Generators that a user made are not among them.

    Args:
        torch: State of PyTorch's generator on the CPU.
        cuda: States of the generators of all CUDA devices; empty where CUDA is not in use.
        numpy: State of NumPy's global generator.
        python: State of the module ``random``.

    Example:
        >>> state = RandomState.capture()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(torch.rand(3), first)
        True
    """

    torch: Tensor
    cuda: tuple[Tensor, ...]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """The random states as they are now."""
        numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
        numpy["state"] = {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in numpy["state"].items()
        }
        return cls(
            torch=torch.get_rng_state(),
            cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            numpy=numpy,
            python=random.getstate(),
        )

    def restore(self) -> None:
        """Make these the random states; those of devices that are not here are left out."""
        torch.set_rng_state(self.torch)
        for device, state in zip(range(torch.cuda.device_count()), self.cuda, strict=False):
            torch.cuda.set_rng_state(state, device)
        inner = {
            key: value.numpy() if isinstance(value, Tensor) else value for key, value in self.numpy["state"].items()
        }
        np.random.set_state({**self.numpy, "state": inner})  # noqa: NPY002
        random.setstate(self.python)
