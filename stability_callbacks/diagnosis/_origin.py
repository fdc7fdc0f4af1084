"""Where values that are not finite came from."""

from __future__ import annotations

from typing import NamedTuple

from stability_callbacks.diagnosis._source import SourceLine

__all__ = ["Origin", "Site"]


class Site(NamedTuple):
    """Where an operation ran: the full name of its module (``""``: the root's own code), and the user's line."""

    module: str
    line: SourceLine | None


class Origin(NamedTuple):
    """Where non-finite values came into a forward pass.

    Args:
        order: Rises in the order of time.
        phase: ``"input"``, ``"parameter"``, ``"buffer"``: there before; ``"forward"``: made by an operation;
            ``"given"``: there before, in some other tensor.
        name: The place in the batch, the name of the parameter or buffer, or the operation.
        what: What happened, in words.
        intended: Whether they are infinities that someone wrote on purpose, as for masks.
        site: Where the operation ran; None for what was there before.
        reason: Why an operation made them, one of ``REASONS``; None where that can't be told.
    """

    order: int
    phase: str
    name: str
    what: str
    intended: bool = False
    site: Site | None = None
    reason: str | None = None
