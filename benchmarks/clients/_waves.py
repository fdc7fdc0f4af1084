"""Series to forecast: noisy sines, and a covariate for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LENGTH", "season", "waves"]

LENGTH = 120
PERIOD = 12


def waves(count: int = 8) -> NDArray[np.float32]:
    """Sines of period ``PERIOD`` with phases and noise of their own, shape ``[count, LENGTH]``."""
    generator = np.random.default_rng(0)
    phases = generator.uniform(0, 2 * np.pi, (count, 1))
    time = np.arange(LENGTH)[None]
    noise = 0.1 * generator.standard_normal((count, LENGTH))
    return (np.sin(2 * np.pi * time / PERIOD + phases) + noise).astype(np.float32)


def season(length: int) -> NDArray[np.float64]:
    """A cosine of the sines' period: a covariate that is known ahead of time."""
    cosine: NDArray[np.float64] = np.cos(2 * np.pi * np.arange(length) / PERIOD)
    return cosine
