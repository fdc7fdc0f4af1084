"""What a client is: a public product that trains by Lightning, and one small training with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["QUIET", "Client"]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Client:
    """A product and one small training with it.

    Args:
        model: What is trained.
        package: The package of Lightning that the product imports.
        poison: What is wrong with the poisoned input.
        metric: What ``train`` returns.
        kind: The kind for ``stability_suite``.
        train: Trains on clean or poisoned input, with callbacks, and measures on clean data.
    """

    model: str
    package: str
    poison: str
    metric: str
    kind: str
    train: Callable[[bool, list[Any]], float]
