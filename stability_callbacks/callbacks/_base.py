"""What our callbacks have in common: they take part in the life of a step, which one of them drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from stability_callbacks.callbacks._lifecycle import StepLifecycle

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

    from stability_callbacks.callbacks._optimizer_step import OptimizerStep
    from stability_callbacks.callbacks._step_record import PendingRecord, StepRecord
    from stability_callbacks.diagnosis import Incident

__all__ = ["StabilityCallback"]


class StabilityCallback(Callback):
    """A callback that takes part in the life of a step.

    The first of them in the trainer's list passes Lightning's hooks on to the trainer's one
    :class:`~stability_callbacks.callbacks._lifecycle.StepLifecycle`; that calls the methods below, on each callback, in
    an order that does not depend on their places in the list.
    """

    _lifecycle: StepLifecycle | None = None

    # ---- what a callback may contribute to a step

    def prepare(self, lifecycle: StepLifecycle) -> None:
        """Check the configuration and read what is known at train start."""

    def begin_training(self, lifecycle: StepLifecycle) -> None:
        """Start work that needs all callbacks prepared."""

    def tamper(self, batch: Any, batch_idx: int) -> None:
        """Rehearse a fault: change a micro-batch or the state of training before anyone looks at them."""

    def look_at(self, batch: Any, batch_idx: int, first: bool) -> None:
        """Look at a micro-batch before its forward pass; ``first`` says that a new window begins with it."""

    def tamper_with_loss(self, loss: Tensor) -> None:
        """Rehearse a fault: change a micro-batch's loss in place before anyone looks at it."""

    def norm_types(self) -> Sequence[float]:
        """The norms that must be measured before anyone changes a gradient."""
        return ()

    def compares_losses(self) -> bool:
        """Whether it remembers losses, so that all processes must show it the same ones."""
        return False

    def observe(self, step: OptimizerStep) -> None:
        """Look at the raw gradients."""

    def vote(self, step: OptimizerStep) -> Sequence[tuple[str, Tensor]]:
        """Vote against the step: the kind of incident and a 0-dim boolean for each detector."""
        return ()

    def watch(self, step: OptimizerStep) -> Sequence[tuple[str, Tensor]]:
        """Flag the step without voting against it: a name and a 0-dim boolean, the same on all ranks in the record."""
        return ()

    def clip(self, step: OptimizerStep) -> None:
        """Shrink the gradients."""

    def penalize(self, step: OptimizerStep) -> None:
        """Add penalties, with the learning rates of the step in force."""

    def rate_multipliers(self, step: OptimizerStep) -> Sequence[float] | None:
        """A factor for the learning rate of each parameter group, in the optimizer's next step."""
        return None

    def before_update(self, step: OptimizerStep) -> None:
        """Look at weights and clipped gradients right before the arithmetic."""

    def after_update(self, step: OptimizerStep) -> None:
        """Look at the weights right after it."""

    def on_step_attempted(self, step: OptimizerStep) -> None:
        """Count the step, whether it was applied or skipped."""

    def note(self, step: OptimizerStep, record: PendingRecord) -> None:
        """Keep a finished step's numbers, which still lie on the device."""

    def account(self, record: StepRecord) -> None:
        """Take note of a finished step, in order; up to one log interval late."""

    def wants_accounts(self, lifecycle: StepLifecycle) -> bool:
        """Whether all steps must be accounted for at the end of this batch, even if the host has to wait for it."""
        return False

    def after_batch(self, lifecycle: StepLifecycle) -> None:
        """Act on the state of training, once a batch with a step is over and accounted for as far as the host knows."""

    def finish_training(self, lifecycle: StepLifecycle) -> None:
        """Training has ended, or an exception ended it: do what was put off."""

    def statistics(self) -> Sequence[Stateful]:
        """What was learnt from gradients and losses, and must go back when training goes back to a snapshot."""
        return ()

    def on_incident(self, incident: Incident) -> None:
        """Take note of an intervention."""

    def divergence(self) -> str | None:
        """Why training must stop, if it must."""
        return None

    def logs_now(self, lifecycle: StepLifecycle) -> bool:
        """Whether this step's scalars are wanted."""
        return lifecycle.is_logging_step()

    def device_scalars(self) -> Sequence[tuple[Sequence[str], Tensor]]:
        """Names and values (1-dim) of metrics that lie on the device."""
        return ()

    def device_payloads(self) -> Sequence[tuple[Tensor, Callable[[list[float], int], None]]]:
        """Numbers (1-dim) that lie on the device, and who takes them on the host, with their place on the x-axis."""
        return ()

    def host_scalars(self) -> Mapping[str, float]:
        """Metrics that the host knows, asked once the steps so far are accounted for."""
        return {}

    # ---- Lightning's hooks, passed on by the first callback of the list

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._catch_up()  # with a fit that an exception ended
            self._lifecycle = StepLifecycle.of(trainer)

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
            lifecycle.note_loss(loss)

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
        return lifecycle if lifecycle is not None and lifecycle.is_driven_by(self) else None

    def _catch_up(self, everywhere: bool = True) -> None:
        """Bring counters up to date with steps whose verdict may still lie on the device.

        Args:
            everywhere: Whether all processes do so now.
        """
        if self._lifecycle is None:
            return
        if everywhere:
            self._lifecycle.settle()
        else:
            self._lifecycle.catch_up()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_lifecycle", None)
        return state
