"""Poisoned batches: now and then, a batch of the training data is bad."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

__all__ = ["Poison", "poison_batches"]

SCALE = 1e4


@dataclass(frozen=True)
class Poison:
    """Decides which training steps get a bad batch, and spoils it.

    From ``first_step`` on, each stretch of ``one_in`` steps holds exactly one poisoned step at a random place. The
    places come from a stream of their own, a pure function of the seed and the step: every run of one seed meets the
    same bad batches, whatever else draws random numbers.

    Args:
        one_in: Length of a stretch in steps; 100 poisons 1 % of the batches.
        first_step: The first step that may be poisoned, 0-based.
        kind: ``nan`` and ``inf`` spoil the very first number of the batch, as one bad reading would; ``scale``
            multiplies the whole batch by 10,000, as a sensor in other units would.

    Raises:
        ValueError: If ``one_in`` is below 1 or ``first_step`` below 0.

    Example:
        >>> poison = Poison(one_in=4, first_step=2)
        >>> [step for step in range(14) if poison.hits(step, seed=0)]
        [5, 8, 10]
    """

    one_in: int = 100
    first_step: int = 10
    kind: Literal["nan", "inf", "scale"] = "nan"

    def __post_init__(self) -> None:
        if self.one_in < 1:
            raise ValueError(f"`one_in` must be an integer >= 1, got {self.one_in}")
        if self.first_step < 0:
            raise ValueError(f"`first_step` must be an integer >= 0, got {self.first_step}")

    def hits(self, step: int, seed: int) -> bool:
        """Whether the batch of this 0-based step is poisoned."""
        stretch, place = divmod(step - self.first_step, self.one_in)
        return stretch >= 0 and place == random.Random(f"poison {seed} {stretch}").randrange(self.one_in)

    def spoil(self, inputs: Tensor) -> Tensor:
        """Return a spoiled copy of ``inputs``.

        Raises:
            TypeError: If ``inputs`` are not floating-point numbers, which alone can be NaN.
        """
        if not inputs.is_floating_point():
            raise TypeError(f"Poison spoils floating-point inputs, got {inputs.dtype}")
        if self.kind == "scale":
            return inputs * SCALE
        spoiled = inputs.clone()
        spoiled[(0,) * inputs.ndim] = float(self.kind)
        return spoiled


def poison_batches(data: L.LightningDataModule, poison: Poison, seed: int) -> None:
    """Let the training batches ``(inputs, ...)`` of a data module be poisoned on their way to the model.

    Only ``on_before_batch_transfer`` of this one object is replaced, and it still does what it did, on all batches.
    Under gradient accumulation several batches belong to a step: its first one is poisoned.

    Args:
        data: Any data module.
        poison: Which batches to spoil, and how.
        seed: Seed of the places.
    """
    own = data.on_before_batch_transfer if is_overridden("on_before_batch_transfer", data) else None
    last: int | None = None

    def on_before_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
        nonlocal last
        trainer = data.trainer
        assert trainer is not None
        if trainer.training and trainer.global_step != last and poison.hits(trainer.global_step, seed):
            last = trainer.global_step
            inputs, *rest = batch
            batch = [poison.spoil(inputs), *rest]
        # Where the data module has no such hook, Lightning would have asked the model.
        hook = own or trainer.lightning_module.on_before_batch_transfer
        return hook(batch, dataloader_idx)

    data.on_before_batch_transfer = on_before_batch_transfer  # type: ignore[method-assign]
