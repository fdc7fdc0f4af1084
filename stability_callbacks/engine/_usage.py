"""What is used twice or against each other, and is said at train start."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from stability_callbacks.engine._hooks import Participants, Phase, StepHooks

__all__ = ["warn_of_anomaly_detection", "warn_of_doubles"]

# Several faults, monitors, schedules and penalties may be wanted; what judges, clips, records and recovers is one.
_ONCE = {
    Phase.JUDGE: ("guards", "a step is judged, counted and announced by each"),
    Phase.RECORD: ("recorders", "each incident is recorded by each"),
    Phase.RECOVER: ("rollbacks", "each keeps snapshots of its own and goes back by itself"),
}


def warn_of_doubles(participants: Participants) -> None:
    """Warn where two callbacks do the same work, as a suite and a callback of the user's own beside it.

    Args:
        participants: The callbacks of a trainer.
    """
    for phase, (what, consequence) in _ONCE.items():
        _warn_of_several([each for each in participants.all if each.phase == phase], what, consequence)
    clipping = [each for each in participants["clip"] if each.phase not in _ONCE]
    _warn_of_several(clipping, "clippings", "gradients are clipped by one after the other")


def warn_of_anomaly_detection(trainer: pl.Trainer) -> None:
    """Warn where ``detect_anomaly`` ends training at the first NaN, before a guard can skip the step.

    In a single process its exception is caught, and the step skipped. Of several processes, one that breaks its
    backward pass off would leave the others waiting.

    Args:
        trainer: The trainer, while it trains.
    """
    if trainer.world_size > 1 and torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        rank_zero_warn(
            "Anomaly detection is on (`Trainer(detect_anomaly=True)` or `torch.autograd.set_detect_anomaly`), and "
            f"there are {trainer.world_size} processes: the first NaN in a backward pass raises an exception and ends "
            "training, so bad steps can't be skipped. Turn it off: FlightRecorder names the operation that made the "
            "NaN, too."
        )


def _warn_of_several(callbacks: Sequence[StepHooks], what: str, consequence: str) -> None:
    if len(callbacks) < 2:
        return
    names = [type(each).__name__ for each in callbacks]
    rank_zero_warn(
        f"There are {len(names)} {what} among the trainer's callbacks ({', '.join(names)}): {consequence}. If one of "
        "them came with stability_suite(), replace it there: "
        f"[each for each in stability_suite(kind) if not isinstance(each, {names[0]})] + [yours]."
    )
