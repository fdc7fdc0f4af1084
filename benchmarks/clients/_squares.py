"""Images to classify: in which quadrant a bright square lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["accuracy", "loader", "squares"]


def squares(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images ``[count, 1, 32, 32]`` and their quadrants."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(count, 1, 32, 32, generator=generator)
    quadrants = torch.randint(4, (count,), generator=generator)
    for image, quadrant in zip(images, quadrants.tolist(), strict=True):
        row, column = 16 * (quadrant // 2) + 4, 16 * (quadrant % 2) + 4
        image[0, row : row + 8, column : column + 8] += 1.5
    return images, quadrants


def loader(poisoned: bool) -> DataLoader[Any]:
    """The training images in batches; if poisoned, with one NaN pixel."""
    images, quadrants = squares(320, seed=0)
    if poisoned:
        images[40, 0, 5, 5] = float("nan")
    return DataLoader(TensorDataset(images, quadrants), batch_size=16)


def accuracy(model: Any) -> float:
    """Of a classifier that gives logits, on images of its own."""
    images, quadrants = squares(200, seed=1)
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == quadrants).float().mean())
