"""The verdict on a step: whether its update is applied, as all processes find together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stability_callbacks.engine._processes import Processes

__all__ = ["Flags", "Verdict", "reach_verdict"]

Flags = Sequence[tuple[str, Tensor]]
"""Names, each with a 0-dim boolean on the gradients' device."""


@dataclass
class Verdict:
    """What was found about a step.

    Attributes:
        votes: The kinds of incident that were voted on, with what all processes found.
        watches: What was watched for besides, without a vote.
        skip: Whether the update must not be applied, on the device, 0-dim; None if nobody votes.
        skipped: The same where the host knows it, else None.
        flagged: Whether the host knows of a flag that is set.
        found_here: Whether this process voted against the step, 0-dim; None where there is only one process.
    """

    votes: Flags = ()
    watches: Flags = ()
    skip: Tensor | None = None
    skipped: bool | None = None
    flagged: bool = False
    found_here: Tensor | None = None

    def read(self) -> None:
        """Let the host know: the one wait for the device in a step."""
        assert self.skip is not None
        known = torch.stack([flag for _, flag in (*self.votes, *self.watches)]).tolist()
        self.skipped, self.flagged = any(known[: len(self.votes)]), any(known)


def reach_verdict(votes: Flags, watches: Flags, processes: Processes) -> Verdict:
    """Put the votes of all callbacks and all processes together, on the device.

    Args:
        votes: What detectors vote.
        watches: What is flagged without a vote.
        processes: The processes, which must all come here.
    """
    if not votes and not watches:
        return Verdict()
    flags = torch.stack([flag for _, flag in (*votes, *watches)])
    if processes.several:
        flags = flags.to(processes.device)  # those of a step without gradients lie on the host
    found_here = flags[: len(votes)].any() if processes.several else None
    flags = processes.any_of_each(flags)
    count = len(votes)
    verdict = Verdict(_renewed(votes, flags[:count]), _renewed(watches, flags[count:]), found_here=found_here)
    if votes:
        verdict.skip = flags[:count].any()
    return verdict


def _renewed(named: Flags, flags: Tensor) -> Flags:
    return [(name, flag) for (name, _), flag in zip(named, flags, strict=True)]
