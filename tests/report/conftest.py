"""A kind of the user's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stability_callbacks.diagnosis import Kind, register_kind
from stability_callbacks.diagnosis._kinds import _registered


@pytest.fixture
def own_kind() -> Iterator[Kind]:
    """Registered for one test."""
    kind = Kind(
        "mine",
        severity="warning",
        gravity=1,
        color="#0a6b5c",
        dark_color="#5cead0",
        title="Batches come late",
        meaning="The device waits for data.",
        remedies=("Give the loader more workers: `num_workers=8`.",),
    )
    yield register_kind(kind)
    del _registered[kind.name]
