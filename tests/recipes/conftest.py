"""What the recipes set for their whole process is undone after each of their tests; a text to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipes.data import Text
from tests.recipes.tiny import LENGTH


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Recipes flush denormals to zero for speed; later tests need them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question.\n" * 30)
    return Text(batch_size=8, length=LENGTH, path=tmp_path / "text.txt")
