"""A copy of the parameters that no optimizer trains and a forward pass moves: the weights of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from stability_callbacks._identity import same_objects
from stability_callbacks.gradient_pass import group_by_device_and_dtype

__all__ = ["MovingParameters"]

# Backups after which it is seen whether anything moves; in manual optimization there are two in a batch.
_TRIAL = 12

# A teacher is about as large as its student. What is far larger is a frozen backbone, which nobody copies each step.
_LARGEST = 2.0


class MovingParameters:
    """Backs up the weights that ``training_step`` itself moves, such as a momentum teacher's, and puts them back.

    Mean teacher, MoCo, BYOL and DINO update a teacher inside of the training step. A batch that is skipped must not
    have moved it. Whether anything moves is seen in the first windows of an epoch; what stays is not copied any more.

    Args:
        module: The model.
        trained: Gives the ``id`` of each parameter that an optimizer has.
    """

    def __init__(self, module: nn.Module, trained: Callable[[], Collection[int]]) -> None:
        self._module = module
        self._trained = trained
        self._moving = False
        self._backups = 0
        self._watched: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._moved: Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look for parameters that were added, or that an optimizer has got since."""
        watched = _candidates(self._module, self._trained())
        if not same_objects(watched, self._watched):
            self._watched, self._copies = watched, []
        self._backups = 0

    @torch.no_grad()
    def take(self) -> None:
        """Back up what may move."""
        if not self._watched:
            return
        if not self._moving:
            self._see_whether_it_moves()
        if len(self._copies) != len(self._watched):
            self._copies = [each.detach().clone() for each in self._watched]
        else:
            _copy(self._copies, [each.detach() for each in self._watched])
        self._backups += 1

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, bit for bit."""
        if self._copies:
            _copy([each.detach() for each in self._watched], self._copies)

    def restorable_where(self) -> bool:
        """Whether :meth:`restore_where` can do the same: it always can."""
        return True

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Put them back if a condition holds that only the device knows.

        Args:
            condition: 0-dim boolean on the device.
        """
        for parameter, copy in zip(self._watched, self._copies, strict=False):
            parameter.copy_(torch.where(condition.to(copy.device), copy, parameter))

    @torch.no_grad()
    def adopt_changes_since(self, other: MovingParameters) -> None:
        """What others have written since another backup was taken stays, also if this one is restored."""
        known = {id(parameter): copy for parameter, copy in zip(other._watched, other._copies, strict=False)}
        for parameter, copy in zip(self._watched, self._copies, strict=False):
            if id(parameter) in known:
                copy.copy_(torch.where(parameter != known[id(parameter)], parameter, copy))

    def _see_whether_it_moves(self) -> None:
        for parameter, copy in zip(self._watched, self._copies, strict=False):
            moved = (parameter != copy).any()
            self._moved = moved if self._moved is None else self._moved | moved.to(self._moved.device)
        if self._backups == _TRIAL and self._moved is not None:  # the only time that the host waits for the device
            self._moving = bool(self._moved)
            if not self._moving:
                self._watched, self._copies, self._moved = [], [], None


def _candidates(module: nn.Module, trained: Collection[int]) -> list[Tensor]:
    tensors: Iterable[Tensor] = module.parameters()
    parameters = [each for each in tensors if not isinstance(each, DTensor | UninitializedParameter)]
    free = [each for each in parameters if id(each) not in trained]
    size = sum(each.numel() for each in parameters if id(each) in trained)
    return free if sum(each.numel() for each in free) <= _LARGEST * size else []


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for members in group_by_device_and_dtype(targets).values():
        torch._foreach_copy_([targets[index] for index in members], [sources[index] for index in members])
