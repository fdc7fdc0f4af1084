"""Lightning callbacks, one a file: they say when; the policies they are given say what."""

from stability_callbacks.callbacks.fault_injector import FaultInjector
from stability_callbacks.callbacks.flight_recorder import FlightRecorder
from stability_callbacks.callbacks.gradient_clipping import GradientClipping
from stability_callbacks.callbacks.gradient_monitor import GradientMonitor
from stability_callbacks.callbacks.initialization import Initialization
from stability_callbacks.callbacks.lr_schedule import LRSchedule
from stability_callbacks.callbacks.rollback import Rollback
from stability_callbacks.callbacks.step_guard import StepGuard
from stability_callbacks.callbacks.weight_penalty import WeightPenalty
from stability_callbacks.snapshots import newest_readable_checkpoint

__all__ = [
    "FaultInjector",
    "FlightRecorder",
    "GradientClipping",
    "GradientMonitor",
    "Initialization",
    "LRSchedule",
    "Rollback",
    "StepGuard",
    "WeightPenalty",
    "newest_readable_checkpoint",
]
