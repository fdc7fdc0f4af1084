"""The life of a step: one object per trainer that all our callbacks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import LBFGS, Optimizer

from stability_callbacks.callbacks._optimizer_step import OptimizerStep, optimizer_labels, several_closures
from stability_callbacks.callbacks._scalar_log import PendingRecord, ScalarLog
from stability_callbacks.errors import TrainingDivergedError
from stability_callbacks.snapshots import BufferBackup

if TYPE_CHECKING:
    from stability_callbacks.callbacks._base import StabilityCallback

__all__ = ["StepLifecycle"]

# Step records wait on the device for the next log step, or until there are this many.
_MOST_PENDING_RECORDS = 4096

# Segments that wrappers put into parameter names.
_WRAPPER_SEGMENTS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class StepLifecycle:
    """Takes each optimizer step of a trainer through its life, on behalf of all our callbacks.

    The gradients are measured once, all detectors vote, one verdict is reached, and it is acted on inside
    ``optimizer.step``. Whatever the callbacks' order in the trainer's list, they are called in one canonical order.

    Args:
        trainer: The trainer.
        callbacks: Our callbacks among the trainer's, in its order; the first one passes Lightning's hooks on.

    Attributes:
        trainer: The trainer.
        callbacks: Our callbacks, in canonical order.
        distributed: Whether a verdict must be agreed on between processes.
        steps: The current step of each optimizer.
        buffers: The backup of the model's buffers, if a callback asked for one.
    """

    def __init__(self, trainer: pl.Trainer, callbacks: list[StabilityCallback]) -> None:
        self.trainer = trainer
        self.callbacks = sorted(callbacks, key=lambda callback: (type(callback).__qualname__, callback.state_key))
        self.distributed = False
        self.steps: dict[Optimizer, OptimizerStep] = {}
        self.buffers: BufferBackup | None = None
        self._driver = callbacks[0]
        self._log = ScalarLog(trainer, self.callbacks)
        self._module: pl.LightningModule | None = None
        self._loss: Tensor | None = None
        self._batch_idx = 0
        self._in_batch = False
        self._window_open = False
        self._stepped = False
        self._steps_seen = False
        self._skip_known = False
        self._waited = False
        self._warned_of_bypass = False
        self._released = False

    @classmethod
    def of(cls, trainer: pl.Trainer) -> StepLifecycle:
        """The lifecycle that the trainer's callbacks share, made for the first that asks."""
        from stability_callbacks.callbacks._base import StabilityCallback

        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, StabilityCallback)]  # type: ignore[attr-defined]
        for callback in callbacks:
            lifecycle = callback._lifecycle
            if lifecycle is not None and lifecycle.trainer is trainer and not lifecycle._released:
                return lifecycle
        return cls(trainer, callbacks)

    def is_driven_by(self, callback: StabilityCallback) -> bool:
        """Whether a callback is the one that passes Lightning's hooks on."""
        return callback is self._driver

    # ---- what callbacks may ask

    @property
    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The model's parameters, tied ones once, named without the segments that wrappers add."""
        assert self._module is not None
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a validation, its parameters are not those that the optimizer knows
        return [(_plain_name(name), parameter) for name, parameter in self._module.named_parameters()]

    @property
    def x(self) -> int:
        """Where the current step lies on the x-axis of metrics, the one that ``self.log`` uses."""
        return self.trainer.fit_loop.epoch_loop._batches_that_stepped

    @property
    def log_every_n_steps(self) -> int:
        """The trainer's cadence; 0 for never."""
        cadence: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return cadence

    def is_logging_step(self, every_n_steps: int | None = None) -> bool:
        """Whether metrics are due, by the trainer's cadence or a given one; counted in optimizer steps."""
        cadence = self.log_every_n_steps if every_n_steps is None else every_n_steps
        return bool(cadence > 0 and (self.x + 1) % cadence == 0)

    def shows_rates(self, step: OptimizerStep) -> bool:
        """Whether ``group["lr"]`` may hold the effective rate between steps: only if no scheduler reads it back."""
        scheduled = any(config.scheduler.optimizer is step.optimizer for config in self.trainer.lr_scheduler_configs)
        return not scheduled and not any("initial_lr" in group for group in step.optimizer.param_groups)

    def write(self, write: Callable[[Logger], None]) -> None:
        """Write something to every logger; one that fails is warned of once and does not end training."""
        self._log.write(write)

    def protect_buffers(self) -> None:
        """Ask that the model's buffers be backed up before each step and restored if it is skipped."""
        assert self._module is not None
        if self.buffers is None:
            self.buffers = BufferBackup(self._module)

    def buffers_restorable_on_device(self) -> bool:
        """Whether a skip that only the device knows of could be undone in the buffers too."""
        return self.buffers is None or self.buffers.restorable_where()

    # ---- the hooks, in the order in which they fire

    def start(self, module: pl.LightningModule) -> None:
        """Reach into the optimizers and let the callbacks prepare."""
        self._module = module
        self._refuse_what_cannot_work()
        self.distributed = self.trainer.world_size > 1 and torch.distributed.is_initialized()
        optimizers = [optimizer for optimizer in self.trainer.optimizers if not isinstance(optimizer, _MockOptimizer)]
        labels = optimizer_labels(optimizers)
        for index, (optimizer, label) in enumerate(zip(optimizers, labels, strict=True)):
            self.steps[optimizer] = OptimizerStep(self, optimizer, index, label, several=len(optimizers) > 1)
        if not any(parameter.requires_grad for step in self.steps.values() for _, parameter in step.parameters):
            rank_zero_warn(
                "No optimizer has a trainable parameter, so the stability callbacks have nothing to watch or protect."
            )
        for callback in self.callbacks:
            callback.prepare(self)
        for step in self.steps.values():
            if self.shows_rates(step):
                step.scale_rates()

    def begin_batch(self, batch_idx: int) -> None:
        """A batch starts: at a window's first micro-batch the buffers are backed up."""
        for step in self.steps.values():
            step.abandon()
        self._batch_idx = batch_idx
        self._in_batch = True
        self._stepped = self._skip_known = self._waited = False
        if self._module is not None and not self._module.automatic_optimization:
            window_begins = self._loss is None  # nothing was backpropagated since the last step
        else:
            # Lightning zeroes the gradients by the same rule, also where an epoch ends inside a window.
            window_begins = batch_idx % self.trainer.accumulate_grad_batches == 0
        if batch_idx == 0 and self.buffers is not None:
            self.buffers.refresh()
        if window_begins or not self._window_open:
            self._open_window()

    def note_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to that of the step."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def measure(self, optimizer: Optimizer) -> None:
        """Measure, vote and decide; see :meth:`OptimizerStep.measure`."""
        wrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if wrapped in self.steps:
            for step in self.steps.values():
                step.finish_if_over()
            loss, self._loss = self._loss, None
            self._stepped = self._steps_seen = True
            self.steps[wrapped].measure(loss, self._batch_idx)

    def note_wait(self, device: torch.device) -> None:
        """The host has just waited for the device, so whatever was sent before has arrived."""
        if device.type != "cpu":
            self._waited = True
            self._log.deliver()

    def restore_buffers(self) -> None:
        """A step will be skipped: undo what its forward passes wrote to buffers, before another step begins."""
        if self.buffers is not None:
            self.buffers.restore()

    def close_window(self, step: OptimizerStep) -> None:
        """A step is finished; the backup of the buffers still holds if they were restored to it."""
        if step.skipped:
            return
        if self.buffers is not None and step.skip is not None and step.skipped is None:
            self.buffers.restore_where(step.skip)
        self._window_open = False
        if self._module is not None and not self._module.automatic_optimization:
            self._open_window()  # the next optimizer's step may begin in this very batch

    def record(self, step: OptimizerStep, kinds: tuple[str, ...], values: Tensor) -> None:
        """Keep a finished step's numbers on the device until they are read."""
        self._skip_known = self._skip_known or bool(step.skipped)
        epoch = self.trainer.current_epoch
        self._log.add(PendingRecord(step.label, step.global_step, epoch, step.batch_idx, kinds, values))

    def end_batch(self) -> None:
        """Log what is due, account for what is known, and stop a run that has diverged."""
        if self._in_batch:
            self._close_batch()
        self._raise_if_diverged()

    def end_epoch(self) -> None:
        """Account for all steps of the epoch."""
        self.settle()
        self._raise_if_diverged()
        if self.steps and not self._steps_seen and not self._warned_of_bypass:
            self._warn_of_bypass("no step of an optimizer was seen in a whole epoch")

    def settle(self) -> None:
        """Account for every finished step, waiting for the device if need be."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        assert isinstance(progress, _ProcessedTracker)
        if self._in_batch and progress.processed == progress.ready:
            self._close_batch()  # somebody saves a checkpoint in `on_train_batch_end` before our own is called
        for step in self.steps.values():
            step.finish_if_over()
        self._log.send()
        self._log.deliver()

    def close(self) -> None:
        """Training has ended: account for all steps and let go of the optimizers."""
        self.settle()
        self.release()

    def interrupt(self, exception: BaseException) -> None:
        """An exception ends training: account for the steps before, and let go of the optimizers."""
        # After an error of the device another read would fail too, and hide it.
        if isinstance(exception, TrainingDivergedError) or not isinstance(exception, RuntimeError):
            self.settle()
        self.release()

    def release(self) -> None:
        """Put the learning rates back and let go of the optimizers."""
        for step in self.steps.values():
            step.close()
        self.steps.clear()
        self.buffers = None
        self._released = True

    def note_unseen_step(self, optimizer: Optimizer) -> None:
        """An optimizer steps although Lightning's hooks did not announce it."""
        if self._warned_of_bypass or not self._in_batch:
            return
        # torch.distributed.checkpoint makes an optimizer's state by a step with all rates at zero.
        if any(group.get("lr", 1.0) for group in optimizer.param_groups):
            self._warn_of_bypass("an optimizer stepped without Lightning's knowledge")

    # ---- private

    def _close_batch(self) -> None:
        self._in_batch = False
        for step in self.steps.values():
            step.finish_if_over()
        if not self._stepped:
            return
        due = [callback for callback in self.callbacks if callback.logs_now(self)]
        if due or self._skip_known or len(self._log) >= _MOST_PENDING_RECORDS:
            self._log.send(due, self.x)
            if self._skip_known or not self._waited:
                self._log.deliver()

    def _open_window(self) -> None:
        self._window_open = True
        self._loss = None
        if self.buffers is not None:
            self.buffers.take()

    def _warn_of_bypass(self, what: str) -> None:
        self._warned_of_bypass = True
        rank_zero_warn(
            f"The stability callbacks see and protect nothing here: {what}. In manual optimization, step the "
            "optimizers that `self.optimizers()` returns (not `optimizer.optimizer`) and call "
            "`self.manual_backward(loss)`."
        )

    def _raise_if_diverged(self) -> None:
        for callback in self.callbacks:
            if reason := callback.divergence():
                raise TrainingDivergedError(reason)

    def _refuse_what_cannot_work(self) -> None:
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise several_closures(optimizer)
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy):
            raise MisconfigurationException(
                "The stability callbacks do not work with FSDPStrategy (FSDP1), whose flattened shards hide the "
                "parameters' norms. Use ModelParallelStrategy with `fully_shard` (FSDP2) in `configure_model`."
            )
        if strategy.handles_gradient_accumulation:
            raise MisconfigurationException(
                f"The stability callbacks do not work with {type(strategy).__name__}, which keeps gradients and "
                "optimizer steps to itself. Use DDPStrategy or ModelParallelStrategy."
            )


def _plain_name(name: str) -> str:
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name
