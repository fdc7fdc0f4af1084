"""Callbacks that keep PyTorch Lightning training alive, and say what happened.

The policies below the callbacks (``clipping``, ``detection``, ``schedules``, ``initialization``) are plain PyTorch and
import without Lightning, so the callbacks are loaded when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stability_callbacks.errors import TrainingDivergedError

if TYPE_CHECKING:
    from stability_callbacks.callbacks import (
        FaultInjector,
        FlightRecorder,
        GradientClipping,
        GradientMonitor,
        Initialization,
        LRSchedule,
        Rollback,
        StepGuard,
        WeightPenalty,
        newest_readable_checkpoint,
    )
    from stability_callbacks.suite import stability_suite

__version__ = "0.1.0"

__all__ = [
    "FaultInjector",
    "FlightRecorder",
    "GradientClipping",
    "GradientMonitor",
    "Initialization",
    "LRSchedule",
    "Rollback",
    "StepGuard",
    "TrainingDivergedError",
    "WeightPenalty",
    "newest_readable_checkpoint",
    "stability_suite",
]

_HOME = {
    "FaultInjector": "callbacks",
    "FlightRecorder": "callbacks",
    "GradientClipping": "callbacks",
    "GradientMonitor": "callbacks",
    "Initialization": "callbacks",
    "LRSchedule": "callbacks",
    "Rollback": "callbacks",
    "StepGuard": "callbacks",
    "WeightPenalty": "callbacks",
    "newest_readable_checkpoint": "callbacks",
    "stability_suite": "suite",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"stability_callbacks.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
