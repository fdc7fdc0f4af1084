"""What is kept of a finished step: first on the device, then on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stability_callbacks.diagnosis import kind_of

__all__ = ["PendingRecord", "StepRecord"]


class StepRecord(NamedTuple):
    """What is kept of a finished step.

    Attributes:
        optimizer: The optimizer's label.
        global_step: ``trainer.global_step`` when the step was attempted.
        epoch: The epoch.
        batch_idx: The batch that completed the step.
        loss: Mean loss over the step's micro-batches; NaN where it was not seen.
        norm: Raw total gradient norm.
        clipped_norm: Total norm after clipping.
        coefficient: What clipping multiplied the total norm by.
        loss_scale: The loss scale, NaN if there was no scaler.
        own_loss: The loss of this process, where ``loss`` may be the mean of all.
        found_here: Whether this process voted against the step.
        votes: The kinds of incident that were voted.
        watches: What was flagged besides, without a vote.
    """

    optimizer: str
    global_step: int
    epoch: int
    batch_idx: int
    loss: float
    norm: float
    clipped_norm: float
    coefficient: float
    loss_scale: float
    own_loss: float
    found_here: bool
    votes: tuple[str, ...]
    watches: tuple[str, ...]

    @property
    def skipped(self) -> bool:
        """Whether the update was not applied."""
        return bool(self.votes)

    @property
    def kind(self) -> str:
        """The kind of incident: the one of its votes that says most about the cause; empty if it was applied.

        Gradients that overflow under a loss scaler while the loss is finite are expected: "loss_scale".
        """
        overflow = math.isfinite(self.loss) and not math.isfinite(self.norm)
        if self.votes == ("nonfinite",) and overflow and math.isfinite(self.loss_scale):
            return "loss_scale"
        return min(self.votes, key=lambda kind: kind_of(kind).precedence, default="")


class PendingRecord(NamedTuple):
    """A step record whose numbers still lie on the device.

    They are loss, norm, clipped norm, coefficient, a flag for each kind voted on and for each watched, loss scale, own
    loss, and whether this process voted.
    """

    optimizer: str
    global_step: int
    epoch: int
    batch_idx: int
    vote_kinds: tuple[str, ...]
    watch_kinds: tuple[str, ...]
    values: Tensor

    def complete(self, values: Sequence[float]) -> StepRecord:
        """The record with its numbers."""
        loss, norm, clipped_norm, coefficient, *flags, loss_scale, own_loss, found_here = values
        votes, watches = flags[: len(self.vote_kinds)], flags[len(self.vote_kinds) :]
        return StepRecord(
            *self[:4],
            loss=loss,
            norm=norm,
            clipped_norm=clipped_norm,
            coefficient=coefficient,
            loss_scale=loss_scale,
            own_loss=own_loss,
            found_here=found_here == 1,
            votes=_kinds_of(self.vote_kinds, votes),
            watches=_kinds_of(self.watch_kinds, watches),
        )


def _kinds_of(kinds: Sequence[str], flags: Sequence[float]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(kind for kind, flag in zip(kinds, flags, strict=True) if flag))
