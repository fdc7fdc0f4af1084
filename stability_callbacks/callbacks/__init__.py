"""Lightning callbacks, one a file: they say when; the policies they are given say what."""

from stability_callbacks.callbacks.gradient_clipping import GradientClipping
from stability_callbacks.callbacks.gradient_monitor import GradientMonitor
from stability_callbacks.callbacks.initialization import Initialization
from stability_callbacks.callbacks.lr_schedule import LRSchedule
from stability_callbacks.callbacks.step_guard import StepGuard
from stability_callbacks.callbacks.weight_penalty import WeightPenalty

__all__ = ["GradientClipping", "GradientMonitor", "Initialization", "LRSchedule", "StepGuard", "WeightPenalty"]
