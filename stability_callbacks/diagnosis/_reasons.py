"""Why a value or a gradient is not finite: one short word for machines, and words for people."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["REASONS", "Reason", "overflow_from", "overflow_of", "type_name"]

REASONS = {
    "overflow": "the result is larger than the largest number of its type",
    "overflow_float16": "the same in float16, which ends at 65,504, or in a type of 8 bits",
    "precision": "rounding: with more digits the result is finite and of ordinary size",
    "pole": "the operation grows without bound there, in any precision",
    "domain": "the operation has no value there, in any precision",
    "empty": "a mean, or the like, over no elements or no targets",
    "one_element": "a standard deviation or variance of no more elements than its correction",
    "masked_row": "a softmax of a row in which every position is masked",
    "nonfinite_input": "an infinity or NaN was given to it, by a mask as a rule: 0 * inf or inf - inf",
    "equal_values": "the gradient divides by the difference of two singular values or eigenvalues that are equal",
    "singular": "a matrix without inverse",
    "alignment": "CTC targets that are longer than their frames allow",
    "unset_memory": "memory was read before it was filled",
}
"""The reasons that a :class:`Cause` may give, and what they mean."""


class Reason(NamedTuple):
    """Why a value is not finite; false if there is nothing to say.

    Args:
        kind: One of :data:`REASONS`; None where it can't be told.
        words: It in words, with the numbers that show it.
    """

    kind: str | None = None
    words: str = ""

    def __bool__(self) -> bool:
        return bool(self.words)


def overflow_of(dtype: torch.dtype) -> str:
    """The reason that an overflow of a type is."""
    return "overflow_float16" if torch.finfo(dtype).max < 1e6 else "overflow"


def overflow_from(size: float, dtype: torch.dtype) -> Reason:
    """An overflow of a type, by the largest magnitude that the operation was given."""
    words = f"overflow: the largest input is {size:.6g}, {type_name(dtype)} ends at {torch.finfo(dtype).max:.6g}"
    return Reason(overflow_of(dtype), words)


def type_name(dtype: torch.dtype) -> str:
    """A type's name without its package, such as ``float16``."""
    return str(dtype).removeprefix("torch.")
