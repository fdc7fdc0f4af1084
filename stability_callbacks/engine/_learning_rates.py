"""The learning rates of one optimizer: base rates, and the multiples of them that are in force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LearningRates"]


class LearningRates:
    """Multiplies an optimizer's learning rates and knows the way back.

    A multiple is in force only while the optimizer's arithmetic runs, so that whoever reads ``group["lr"]`` between
    steps (schedulers, callbacks that add parameter groups, checkpoints) finds the base rate. What the optimizer itself
    writes there meanwhile is taken as a new base rate. A group without a rate, or with None (Adafactor with relative
    steps), has no multiple.

    Args:
        optimizer: The optimizer. Its rates may be floats or tensors; tensors are written in place.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> rates = LearningRates(optimizer)
        >>> rates.multiply([0.1])
        >>> optimizer.param_groups[0]["lr"]
        0.05
        >>> rates.restore()
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: dict[int, _GroupRate] = {}

    @property
    def known(self) -> bool:
        """Whether every parameter group has a learning rate."""
        return all(map(_has_rate, self._optimizer.param_groups))

    def multiply(self, multipliers: Sequence[float]) -> None:
        """Set each group's rate to its base rate times a factor.

        Args:
            multipliers: One factor for each parameter group.
        """
        for group, multiplier in zip(self._optimizer.param_groups, multipliers, strict=True):
            if _has_rate(group):
                self._rate(group).multiply(multiplier)

    def restore(self) -> None:
        """Put the base rates back."""
        for rate in self._groups.values():
            rate.restore()
        self._groups.clear()

    def effective(self) -> list[float | Tensor]:
        """The rates in force, one for each parameter group, NaN for one without; tensors stay on their device."""
        rates = (group["lr"] if _has_rate(group) else math.nan for group in self._optimizer.param_groups)
        return [rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates]

    def _rate(self, group: dict[str, Any]) -> _GroupRate:
        return self._groups.setdefault(id(group), _GroupRate(group))


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


def _has_rate(group: dict[str, Any]) -> bool:
    return isinstance(group.get("lr"), (int, float, Tensor))
