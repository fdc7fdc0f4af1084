"""The base class of our callbacks: Lightning's hooks on one side, those of a step on the other."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from stability_callbacks.engine._hooks import StepHooks
from stability_callbacks.engine._lifecycle import StepLifecycle
from stability_callbacks.engine._lightning import Callback, callbacks_of
from stability_callbacks.engine._training import Training

__all__ = ["StabilityCallback"]


class StabilityCallback(StepHooks, Callback):
    """A callback that takes part in the life of a step.

    All of them in a trainer's list share one :class:`~stability_callbacks.engine.StepLifecycle`. The first one passes
    Lightning's hooks on to it; it calls the hooks of :class:`~stability_callbacks.engine.StepHooks` on each, in an
    order that does not depend on their places in the list.
    """

    _lifecycle: StepLifecycle | None = None

    @property
    def training(self) -> Training:
        """The run, from train start on."""
        assert self._lifecycle is not None
        return self._lifecycle.training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._catch_up()  # with a fit that an exception ended
            self._lifecycle = _shared_lifecycle(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if lifecycle := self._driven():
            lifecycle.start(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if lifecycle := self._driven():
            lifecycle.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if lifecycle := self._driven():
            lifecycle.add_loss(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if lifecycle := self._driven():
            lifecycle.on_after_backward()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if lifecycle := self._driven():
            lifecycle.measure(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if lifecycle := self._driven():
            lifecycle.end_batch()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if lifecycle := self._driven():
            lifecycle.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if lifecycle := self._driven():
            lifecycle.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if lifecycle := self._driven():
            lifecycle.interrupt(exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if lifecycle := self._driven():
            lifecycle.close()
            lifecycle.open_gate()
        self._lifecycle = None

    def _driven(self) -> StepLifecycle | None:
        """The trainer's lifecycle if this callback is the one to drive it."""
        lifecycle = self._lifecycle
        return lifecycle if lifecycle is not None and lifecycle.driver is self else None

    def _catch_up(self, everywhere: bool = True) -> None:
        """Bring counters up to date with steps whose verdict may still lie on the device.

        Args:
            everywhere: Whether all processes do so now.
        """
        if self._lifecycle is not None:
            self._lifecycle.read_records(everywhere)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_lifecycle", None)
        return state


def _shared_lifecycle(trainer: pl.Trainer) -> StepLifecycle:
    """The lifecycle that the trainer's callbacks share, made for the first that asks."""
    for callback in callbacks_of(trainer):
        lifecycle = callback._lifecycle if isinstance(callback, StabilityCallback) else None
        if lifecycle is not None and lifecycle.trainer is trainer and not lifecycle.released:
            return lifecycle
    return StepLifecycle(trainer)
