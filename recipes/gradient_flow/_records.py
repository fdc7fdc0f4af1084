"""The observations as plain records: ``results.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.gradient_flow._study import Observation
from stability_callbacks._atomic import atomic_path

__all__ = ["records", "write_records"]


def records(observations: Iterable[Observation]) -> list[dict[str, Any]]:
    """One record a network: its setting and seed, the numbers of each layer, and the verdict.

    A number that is not finite becomes None, as JSON knows neither NaN nor infinity: a ratio of 0 / 0 is one.
    """
    return [
        {
            **each.setting._asdict(),
            "seed": each.seed,
            "first": _finite(each.measurement.first),
            "last": _finite(each.measurement.last),
            "ratio": _finite(each.measurement.ratio),
            "inner_ratio": _finite(each.measurement.inner_ratio),
            "signal": _finite(each.measurement.signal),
            "verdict": each.verdict,
            "gradient_norms": _all_finite(each.measurement.gradient_norms),
            "signal_stds": _all_finite(each.measurement.signal_stds),
        }
        for each in observations
    ]


def write_records(observations: Iterable[Observation], path: Path) -> None:
    """Write the records as a list in strict JSON, one record a line."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records(observations))
    with atomic_path(path) as part:
        part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _all_finite(values: Sequence[float]) -> list[float | None]:
    return [_finite(value) for value in values]
