"""What every test gets: one thread, a fixed seed, an empty working directory, and a quiet Lightning."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tests' tensors are tiny: more threads only wait for each other

# Whatever imports or compiles something, or runs beside other work, is slow: that is no failure.
settings.register_profile(
    "no_clock", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no_clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first: the workers of xdist then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def quiet_lightning() -> None:
    """Show warnings only; Lightning sets its loggers to INFO when it is imported, which is before this."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start each test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the state that a user's transforms draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what a Trainer writes out of the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
