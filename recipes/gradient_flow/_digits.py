"""The handwritten digits that come with scikit-learn, as two batches that share no image."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["CLASSES", "IMAGES", "PIXELS", "Batch", "digits_batches"]

IMAGES, PIXELS, CLASSES = 1797, 64, 10

Batch = tuple[Tensor, Tensor]
"""Images as rows of pixels, standardized by one mean and one standard deviation, and their labels."""


def digits_batches(batch_size: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
    """Draw two batches at random.

    The first is for initializations that look at data, the second to measure on: a network is not judged by the images
    that its weights were fitted to.

    Args:
        batch_size: Images of each batch, at most half of all 1797.
        seed: Seeds the draw.
        dtype: Of the pixels.

    Returns:
        The two batches.
    """
    pixels, classes = _digits(dtype)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))[: 2 * batch_size]
    fit, held_out = order.split(batch_size)
    return (pixels[fit], classes[fit]), (pixels[held_out], classes[held_out])


@cache
def _digits(dtype: torch.dtype) -> Batch:
    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor((images - images.mean()) / images.std(), dtype=dtype), torch.as_tensor(labels)
