"""The window of micro-batches whose gradients make one optimizer step."""

from __future__ import annotations

from torch import Tensor, nn

from stability_callbacks.snapshots import BufferBackup

__all__ = ["AccumulationWindow"]


class AccumulationWindow:
    """Adds up the losses of a window, and keeps the model's buffers as they were when it began.

    In automatic optimization Lightning zeroes the gradients where ``batch_idx`` is a multiple of the window's size,
    also where an epoch ended inside of a window. In manual optimization a window begins after each step.

    Args:
        module: The model.
        manual: Whether it optimizes manually.

    Attributes:
        buffers: The backup of the model's buffers, if a callback asked for one.
    """

    def __init__(self, module: nn.Module, manual: bool) -> None:
        self._module = module
        self._manual = manual
        self._open = False
        self._loss: Tensor | None = None
        self.buffers: BufferBackup | None = None

    def protect_buffers(self) -> None:
        """From now on back the buffers up."""
        if self.buffers is None:
            self.buffers = BufferBackup(self._module)

    def on_batch(self, batch_idx: int, size: int) -> bool:
        """A micro-batch starts; open a window if one begins with it.

        Args:
            batch_idx: Its index in the epoch.
            size: The number of micro-batches in a window.

        Returns:
            Whether one does.
        """
        if batch_idx == 0 and self.buffers is not None:
            self.buffers.refresh()
        begins = not self._open or (self._loss is None if self._manual else batch_idx % size == 0)
        if begins:
            self._begin()
        return begins

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to that of the step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def take_loss(self) -> Tensor | None:
        """The loss of the step that is judged now, None where it was not seen."""
        loss, self._loss = self._loss, None
        return loss

    def restorable_on_device(self) -> bool:
        """Whether a skip that only the device knows of could be undone in the buffers too."""
        return self.buffers is None or self.buffers.restorable_where()

    def restore_buffers(self) -> None:
        """A step will be skipped: undo what its forward passes wrote to buffers, before another step begins."""
        if self.buffers is not None:
            self.buffers.restore()

    def end(self, skip: Tensor | None, skipped: bool | None) -> None:
        """A step is finished.

        Args:
            skip: The verdict on the device, 0-dim boolean; None if there was none.
            skipped: The verdict where the host knows it.
        """
        if skipped:
            return  # the backup still holds, since the buffers were restored to it
        if self.buffers is not None and skip is not None and skipped is None:
            self.buffers.restore_where(skip)
        self._open = False
        if self._manual:
            self._begin()  # the next optimizer's step may begin in this very batch

    def forget(self) -> None:
        """The state of training was replaced: what was taken from the state before is void."""
        self._open = False

    def _begin(self) -> None:
        self._open = True
        self._loss = None
        if self.buffers is not None:
            self.buffers.take()
