"""Running code on a copy of a model, where a copy of the process is not to be had."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from stability_callbacks.diagnosis._forked import Failure, in_a_line
from stability_callbacks.diagnosis._sealed import can_be_sealed
from stability_callbacks.diagnosis._values import tensors_in

__all__ = ["can_run_in_fork", "run_on_copy"]

T = TypeVar("T")


def can_run_in_fork(model: nn.Module, batch: Any = None) -> bool:
    """Whether :func:`run_in_fork` can run a model: on this system, and with all its tensors in host memory.

    Args:
        model: The model.
        batch: What it is run on, of any nesting.
    """
    tensors = tensors_in([model.state_dict(), batch])
    return can_be_sealed() and all(each.device.type == "cpu" for each in tensors)


def run_on_copy(
    work: Callable[[nn.Module, Any], T], model: nn.Module, batch: Any, shared: Iterable[object] = ()
) -> T | Failure:
    """Run code on deep copies of a model and a batch, where they are: on an accelerator, say.

    Use it where :func:`run_in_fork` can't be used. The copy is the model's and the batch's alone: whatever hangs on
    them, such as a teacher, an iterator, a generator or counters, is the copy's own, but globals and what is ``shared``
    are not. It needs memory for a second model.

    Args:
        work: The code, which is given the copies.
        model: The model.
        batch: The batch.
        shared: What the model refers to and is not to be copied, such as its trainer.

    Returns:
        The result, or a :class:`Failure` if something can't be copied, as generators, open files and tensors inside of
        a graph, or if the work raises.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> run_on_copy(lambda model, batch: model(batch).shape, norm, torch.randn(4, 2))
        torch.Size([4, 2])
        >>> norm.num_batches_tracked
        tensor(0)
    """
    try:
        model, batch = copy.deepcopy((model, batch), {id(each): each for each in shared})
    except Exception as error:  # noqa: BLE001  # a user's objects may raise anything
        return Failure(f"this model can't be copied ({in_a_line(error)})", started=False)
    try:
        return work(model, batch)
    except Exception as error:  # noqa: BLE001  # training goes on
        return Failure(in_a_line(error))
