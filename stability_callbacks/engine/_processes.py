"""What the processes of a run tell each other. Each function must be reached by all of them."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """The processes that train together; with one, no collective is ever called.

    Args:
        trainer: The trainer.

    Attributes:
        several: Whether there are others, which do the same at the same time.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.several = trainer.world_size > 1 and torch.distributed.is_initialized()

    @property
    def device(self) -> torch.device:
        """Where collectives take place."""
        return self._trainer.strategy.root_device

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self._trainer.global_rank

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self._trainer.is_global_zero

    def part(self) -> None:
        """From now on act alone: the others may know nothing of it, and would be waited for in vain."""
        self.several = False

    def least(self, number: int) -> int:
        """The least of the processes' numbers."""
        if not self.several:
            return number
        least = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self._trainer.strategy.reduce_boolean_decision(flag, all=False))

    def any_of_each(self, flags: Tensor) -> Tensor:
        """Whether any process has set each flag, on their device.

        Args:
            flags: Boolean, shape ``[N]``.
        """
        if not self.several:
            return flags
        reduced = flags.to(torch.int32)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return reduced.bool()

    def mean(self, value: Tensor | None) -> Tensor:
        """The mean of the processes' numbers, 0-dim; NaN where one of them has none."""
        if value is None:
            mean = torch.full((), math.nan, device=self.device)
        else:
            mean = value.to(self.device, torch.float32, copy=True)
        torch.distributed.all_reduce(mean)
        return mean / self._trainer.world_size

    def gather(self, told: T) -> list[T]:
        """What each process tells, by rank."""
        if not self.several:
            return [told]
        gathered: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(gathered, told)
        return gathered
