"""What the recipes set for their whole process is undone after each of their tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Recipes flush denormals to zero for speed; later tests need them."""
    yield
    torch.set_flush_denormal(False)
