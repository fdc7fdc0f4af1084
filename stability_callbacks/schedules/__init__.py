"""Schedules: a multiplier of the peak as a pure function of the step."""

from __future__ import annotations

from stability_callbacks.schedules._constant import WarmupConstant
from stability_callbacks.schedules._cosine import WarmupCosine
from stability_callbacks.schedules._inverse_sqrt import WarmupInverseSqrt
from stability_callbacks.schedules._linear import WarmupLinear
from stability_callbacks.schedules._scaled import Scaled
from stability_callbacks.schedules._schedule import Schedule
from stability_callbacks.schedules._stable_decay import WarmupStableDecay

__all__ = [
    "Scaled",
    "Schedule",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "WarmupStableDecay",
]
