"""Series to forecast: noisy sines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LENGTH", "waves"]

LENGTH = 120


def waves(count: int = 8) -> NDArray[np.float32]:
    """Sines of period 12 with phases and noise of their own, shape ``[count, LENGTH]``."""
    generator = np.random.default_rng(0)
    phases = generator.uniform(0, 2 * np.pi, (count, 1))
    time = np.arange(LENGTH)[None]
    noise = 0.1 * generator.standard_normal((count, LENGTH))
    return (np.sin(2 * np.pi * time / 12 + phases) + noise).astype(np.float32)
