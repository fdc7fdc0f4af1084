"""The learning rates of one optimizer: base rates, and the multiples of them that are in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LearningRates"]


class LearningRates:
    """Multiplies an optimizer's learning rates and knows the way back.

    Whatever another party writes to ``group["lr"]`` while a multiple is in force is taken as a new base rate. An
    optimizer's ``state_dict`` always holds base rates, whoever asks for it.

    Args:
        optimizer: The optimizer. Its rates may be floats or tensors; tensors are written in place.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> rates = LearningRates(optimizer)
        >>> rates.multiply([0.1])
        >>> optimizer.param_groups[0]["lr"], optimizer.state_dict()["param_groups"][0]["lr"]
        (0.05, 0.5)
        >>> rates.restore()
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: dict[int, _GroupRate] = {}
        self._hook = optimizer.register_state_dict_post_hook(self._put_base_rates)

    def multiply(self, multipliers: Sequence[float]) -> None:
        """Set each group's rate to its base rate times a factor.

        Args:
            multipliers: One factor for each parameter group.
        """
        for group, multiplier in zip(self._optimizer.param_groups, multipliers, strict=True):
            self._rate(group).multiply(multiplier)

    def restore(self) -> None:
        """Put the base rates back."""
        for group in self._optimizer.param_groups:
            self._rate(group).restore()
        self._groups.clear()

    def effective(self) -> list[float | Tensor]:
        """The rates in force, one for each parameter group; tensors stay on their device."""
        rates = (group["lr"] for group in self._optimizer.param_groups)
        return [rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates]

    def detach(self) -> None:
        """Put the base rates back and let go of the optimizer."""
        self.restore()
        self._hook.remove()

    def _rate(self, group: dict[str, Any]) -> _GroupRate:
        return self._groups.setdefault(id(group), _GroupRate(group))

    def _put_base_rates(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            if id(group) in self._groups:
                saved["lr"] = self._groups[id(group)].base()


class _GroupRate:
    """One parameter group's rate. Tensors are recognised by their version counter, so that the host need not wait."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group
        self._base: float | Tensor | None = None
        self._written: float | tuple[int, int] | None = None

    def base(self) -> float | Tensor:
        rate: float | Tensor = self._group["lr"]
        if self._base is None or self._written != self._mark(rate):
            return rate.detach().clone() if isinstance(rate, Tensor) else rate
        return self._base.clone() if isinstance(self._base, Tensor) else self._base

    def multiply(self, multiplier: float) -> None:
        self._base = self.base()
        self._write(self._base * multiplier)

    def restore(self) -> None:
        if self._base is not None:
            self._write(self.base())
            self._base = None

    @torch.no_grad()
    def _write(self, value: float | Tensor) -> None:
        rate = self._group["lr"]
        if isinstance(rate, Tensor):
            rate.copy_(value if isinstance(value, Tensor) else torch.as_tensor(value))
        else:
            self._group["lr"] = value
        self._written = self._mark(self._group["lr"])

    @staticmethod
    def _mark(rate: float | Tensor) -> float | tuple[int, int]:
        return (id(rate), rate._version) if isinstance(rate, Tensor) else rate
