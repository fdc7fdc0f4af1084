"""Poisoned batches: now and then, a batch of the training data holds a NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Poison"]


@dataclass(frozen=True)
class Poison:
    """Decides which training steps get a bad batch, and spoils it.

    From ``first_step`` on, each stretch of ``one_in`` steps holds exactly one poisoned step at a random place. The
    places come from a stream of their own, a pure function of ``seed`` and the step: every run of one seed meets the
    same bad batches, whatever else draws random numbers.

    Args:
        one_in: Length of a stretch in steps; 100 poisons 1 % of the batches.
        first_step: The first step that may be poisoned, 0-based.

    Raises:
        ValueError: If ``one_in`` is below 1 or ``first_step`` below 0.

    Example:
        >>> poison = Poison(one_in=4, first_step=2)
        >>> [step for step in range(14) if poison.hits(step, seed=0)]
        [5, 8, 10]
    """

    one_in: int = 100
    first_step: int = 10

    def __post_init__(self) -> None:
        if self.one_in < 1:
            raise ValueError(f"`one_in` must be an integer >= 1, got {self.one_in}")
        if self.first_step < 0:
            raise ValueError(f"`first_step` must be an integer >= 0, got {self.first_step}")

    def hits(self, step: int, seed: int) -> bool:
        """Whether the batch of this 0-based step is poisoned."""
        stretch, place = divmod(step - self.first_step, self.one_in)
        return stretch >= 0 and place == random.Random(f"poison {seed} {stretch}").randrange(self.one_in)

    @staticmethod
    def spoil(inputs: Tensor) -> Tensor:
        """Return a copy of ``inputs`` whose very first number is NaN: one bad reading in one sample of the batch."""
        spoiled = inputs.clone()
        spoiled.view(-1)[0] = torch.nan
        return spoiled
