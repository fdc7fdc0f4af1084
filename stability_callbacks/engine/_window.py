"""The window of micro-batches whose gradients make one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol
from weakref import ref

from torch import Tensor, nn
from torchmetrics import Metric

from stability_callbacks.engine._metric_backup import MetricBackup
from stability_callbacks.engine._moving_parameters import MovingParameters
from stability_callbacks.snapshots import BufferBackup

__all__ = ["AccumulationWindow"]


class _Backup(Protocol):
    def refresh(self) -> None: ...
    def take(self) -> None: ...
    def restore(self) -> None: ...
    def restorable_where(self) -> bool: ...
    def restore_where(self, condition: Tensor) -> None: ...


class AccumulationWindow:
    """Adds up the losses of a window, and keeps buffers, metrics and moving parameters as they were when it began.

    In automatic optimization Lightning zeroes the gradients where ``batch_idx`` is a multiple of the window's size,
    also where an epoch ended inside of a window. In manual optimization a window begins after each step. Forward passes
    that send nothing backward, such as those that renew the statistics of batch normalization, are each a window of
    their own.

    Args:
        module: The model.
        manual: Whether it optimizes manually.
        results: Gives Lightning's metrics of the training epoch.
        trained: Gives the ``id`` of each parameter that an optimizer has.

    Attributes:
        buffers: The backup of the model's buffers, if a callback asked for one.
    """

    def __init__(
        self,
        module: nn.Module,
        manual: bool,
        results: Callable[[], Iterable[Metric]],
        trained: Callable[[], Collection[int]],
    ) -> None:
        self._module = module
        self._manual = manual
        self._results = results
        self._trained = trained
        self._open = False
        self._loss: Tensor | None = None
        self._gradients: dict[int, _Mark] = {}
        self._others: tuple[MetricBackup, MovingParameters] | None = None
        self._between: tuple[BufferBackup, MetricBackup, MovingParameters] | None = None
        self._between_taken = False
        self.buffers: BufferBackup | None = None

    def protect(self, buffers: bool) -> None:
        """From now on back up metrics and moving parameters and, if asked for, the buffers."""
        self._others = self._new_backups()
        if buffers and self.buffers is None:
            self.buffers = BufferBackup(self._module)

    def release(self) -> None:
        """Let go of all copies."""
        self.buffers = self._others = self._between = None

    def on_batch(self, batch_idx: int, size: int) -> bool:
        """A micro-batch starts; open a window if one begins with it.

        Args:
            batch_idx: Its index in the epoch.
            size: The number of micro-batches in a window.

        Returns:
            Whether one does.
        """
        if batch_idx == 0:
            self.refresh()
        begins = not self._open or not self.went_backward() or (not self._manual and batch_idx % size == 0)
        if begins:
            self._begin()
        else:
            self._adopt()
        return begins

    def refresh(self) -> None:
        """Look for modules and parameters that were added or removed."""
        for backup in self._backups():
            backup.refresh()

    def take(self) -> None:
        """Back up what a skip would put back, as it is now."""
        for backup in self._backups():
            backup.take()

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss, 0-dim, to that of the step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def take_loss(self) -> Tensor | None:
        """The loss of the step that is judged now, None where it was not seen."""
        loss, self._loss = self._loss, None
        return loss

    def went_backward(self) -> bool:
        """Whether anything was backpropagated since the window began; a look at the host only."""
        if self._loss is not None:
            return True
        if not self._manual:
            return False
        # `loss.backward()` passes by Lightning's hooks.
        return any(
            parameter.grad is not None
            and not ((mark := self._gradients.get(id(parameter))) and mark.is_of(parameter.grad))
            for parameter in self._module.parameters()
        )

    def pause(self) -> None:
        """A micro-batch is over and the window is not: what others write until the next one is not to be undone."""
        if not self._open or self._others is None:
            return
        if self._between is None:
            self._between = BufferBackup(self._module), *self._new_backups()
        for backup in self._between[0 if self.buffers is not None else 1 :]:
            backup.take()
        self._between_taken = True

    def restorable_on_device(self) -> bool:
        """Whether a skip that only the device knows of could be undone."""
        return all(backup.restorable_where() for backup in self._backups())

    def restore(self) -> None:
        """A step will be skipped: undo what its forward passes wrote, before another step begins."""
        for backup in self._backups():
            backup.restore()

    def end(self, skip: Tensor | None, skipped: bool | None) -> None:
        """A step is finished.

        Args:
            skip: The verdict on the device, 0-dim boolean; None if there was none.
            skipped: The verdict where the host knows it.
        """
        if skipped:  # the backup still holds, since all was restored to it
            self._mark_gradients()
            return
        if skip is not None and skipped is None:
            for backup in self._backups():
                backup.restore_where(skip)
        self._open = False
        if self._manual:
            self._begin()  # the next optimizer's step may begin in this very batch

    def forget(self) -> None:
        """The state of training was replaced: what was taken from the state before is void."""
        self._open = False

    def _begin(self) -> None:
        self._open = True
        self._loss = None
        self._between_taken = False
        self._mark_gradients()
        self.take()

    def _mark_gradients(self) -> None:
        if self._manual:
            self._gradients = {
                id(parameter): _Mark(ref(parameter.grad), parameter.grad._version)
                for parameter in self._module.parameters()
                if parameter.grad is not None
            }

    def _new_backups(self) -> tuple[MetricBackup, MovingParameters]:
        return MetricBackup(self._module, self._results), MovingParameters(self._module, self._trained)

    def _backups(self) -> list[_Backup]:
        return [*([] if self.buffers is None else [self.buffers]), *(self._others or ())]

    def _adopt(self) -> None:
        if self._between is None or not self._between_taken or self._others is None:
            return
        self._between_taken = False
        buffers, metrics, parameters = self._between
        if self.buffers is not None:
            self.buffers.adopt_changes_since(buffers)
        self._others[0].adopt_changes_since(metrics)
        self._others[1].adopt_changes_since(parameters)


class _Mark(NamedTuple):
    """A gradient as it was when a window began."""

    gradient: ref[Tensor]
    version: int

    def is_of(self, gradient: Tensor) -> bool:
        return self.gradient() is gradient and self.version == gradient._version
