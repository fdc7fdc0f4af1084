"""Poisoned batches: now and then, a batch of the training data is bad."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

__all__ = ["Poison", "PoisonedData"]

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
        spoiled.view(-1)[0] = float(self.kind)
        return spoiled


class PoisonedData(L.LightningDataModule):
    """Any data module whose training batches ``(inputs, ...)`` are poisoned on their way to the model.

    Args:
        data: The data module.
        poison: Which batches to spoil, and how.
        seed: Seed of the places.

    Attributes:
        poisoned_batches: How many batches were spoiled so far.
    """

    def __init__(self, data: L.LightningDataModule, poison: Poison, seed: int) -> None:
        super().__init__()
        self.data = data
        self.poison = poison
        self.seed = seed
        self.poisoned_batches = 0
        self._last: int | None = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer = self.trainer
        assert trainer is not None
        # Under gradient accumulation several batches belong to a step; one bad one is enough.
        if trainer.training and trainer.global_step != self._last and self.poison.hits(trainer.global_step, self.seed):
            self._last = trainer.global_step
            self.poisoned_batches += 1
            inputs, *rest = batch
            batch = [self.poison.spoil(inputs), *rest]
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    # ---- the rest is the data module's own

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.data.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.data.state_dict(), "poisoned_batches": self.poisoned_batches, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data.load_state_dict(state_dict["data"])
        self.poisoned_batches = state_dict["poisoned_batches"]
        self._last = state_dict["last"]
