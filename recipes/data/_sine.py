"""Sine waves of random frequency, phase and amplitude: synthetic by nature, made in memory."""

from __future__ import annotations

import math

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.data._loader import ResumableLoader, shuffled_batches

__all__ = ["SineWaves"]

SAMPLES = {"train": 1024, "val": 256, "test": 512}
WAVES_SEED = 1  # one set of waves for all runs: seeds compare training, not luck with the waves
FREQUENCIES = (0.02, 0.1)  # periods a step: a wave takes 10 to 50 steps
AMPLITUDES = (0.5, 1.5)


class SineWaves(L.LightningDataModule):
    """Pieces of sine waves ``(length, 1)``, and the values that follow each, ``(horizon,)``.

    These are synthetic data: each wave has a frequency of 0.02 to 0.1 periods a step, an amplitude of 0.5 to 1.5 and
    any phase, all drawn evenly and once for all runs. 1024 waves are for training, 256 for choosing settings, 512 for
    the result.

    Args:
        batch_size: Waves a batch.
        seed: Seeds the order of the training batches.
        length: Values to read.
        horizon: Values to predict.

    Example:
        >>> data = SineWaves(batch_size=4)
        >>> data.setup("fit")
        >>> waves, values = next(iter(data.train_dataloader()))
        >>> waves.shape, values.shape
        (torch.Size([4, 48, 1]), torch.Size([4, 8]))
    """

    def __init__(
        self,
        batch_size: PositiveInt = 32,
        seed: NonNegativeInt = 0,
        length: PositiveInt = 48,
        horizon: PositiveInt = 8,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.length = length
        self.horizon = horizon

    def setup(self, stage: str) -> None:
        waves = sine_waves(sum(SAMPLES.values()), self.length + self.horizon, torch.Generator().manual_seed(WAVES_SEED))
        inputs, targets = waves.split([self.length, self.horizon], dim=1)
        parts = zip(
            inputs.unsqueeze(-1).split(list(SAMPLES.values())), targets.split(list(SAMPLES.values())), strict=True
        )
        self.train, self.val, self.test = (TensorDataset(*part) for part in parts)

    def train_dataloader(self) -> ResumableLoader:
        return shuffled_batches(self.train, self.batch_size, self.seed, self.trainer)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, SAMPLES["val"])

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, SAMPLES["test"])


def sine_waves(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw ``(count, steps)`` values of sine waves, one wave a row."""
    frequency, amplitude, phase = (
        torch.empty(count, 1).uniform_(low, high, generator=generator)
        for low, high in (FREQUENCIES, AMPLITUDES, (0.0, 2 * math.pi))
    )
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(steps) + phase)
