"""Errors of this package."""

from __future__ import annotations

__all__ = ["TrainingDivergedError"]


class TrainingDivergedError(RuntimeError):
    """Training can't go on: too many steps in a row, or too large a share of the recent ones, were bad.

    The message says what was seen, in which step and where, and what to try. The weights are those after the last
    good step.
    """
