"""The handwritten digits that come with scikit-learn, in the split that the recorded figures were taken on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Digits"]

TEST_SIZE = 450
SPLIT_SEED = 0  # one split for all runs: seeds compare training, not luck with the test set


class Digits(L.LightningDataModule):
    """Digits as rows of 64 numbers, standardized with the training mean and standard deviation; 1347 train, 450 test.

    Args:
        batch_size: Samples a batch.
        seed: Seeds the order of the training batches, in a random stream of its own.
    """

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        train_x, test_x, train_y, test_y = train_test_split(
            images, labels, test_size=TEST_SIZE, stratify=labels, random_state=SPLIT_SEED
        )
        mean, std = train_x.mean(), train_x.std()
        self.train = _dataset((train_x - mean) / std, train_y)
        self.test = _dataset((test_x - mean) / std, test_y)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=TEST_SIZE)


def _dataset(images: Any, labels: Any) -> TensorDataset:
    return TensorDataset(torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels))
