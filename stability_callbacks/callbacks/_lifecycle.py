"""The life of a step: one object per trainer that all our callbacks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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

from stability_callbacks.callbacks._checkpoint_gate import CheckpointGate
from stability_callbacks.callbacks._optimizer_step import OptimizerStep, optimizer_labels, several_closures
from stability_callbacks.callbacks._scalar_log import ScalarLog
from stability_callbacks.callbacks._training_state import averaged_models
from stability_callbacks.diagnosis import Incident
from stability_callbacks.errors import TrainingDivergedError
from stability_callbacks.snapshots import BufferBackup, SnapshotRing

if TYPE_CHECKING:
    from stability_callbacks.callbacks._base import StabilityCallback
    from stability_callbacks.callbacks._checkpoint_ring import CheckpointRing
    from stability_callbacks.callbacks._step_record import PendingRecord, StepRecord

__all__ = ["StepLifecycle"]

T = TypeVar("T")

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
        distributed: Whether there are other processes, which do the same at the same time.
        steps: The current step of each optimizer.
        buffers: The backup of the model's buffers, if a callback asked for one.
        batch_idx: The index of the current batch.
    """

    def __init__(self, trainer: pl.Trainer, callbacks: list[StabilityCallback]) -> None:
        self.trainer = trainer
        self.callbacks = sorted(callbacks, key=lambda callback: (type(callback).__qualname__, callback.state_key))
        self.distributed = False
        self.steps: dict[Optimizer, OptimizerStep] = {}
        self.buffers: BufferBackup | None = None
        self._driver = callbacks[0]
        self._log = ScalarLog(trainer, self.callbacks)
        self._gate: CheckpointGate | None = None
        self._state: SnapshotRing | None = None
        self._refused_at: int | None = None
        self._module: pl.LightningModule | None = None
        self._loss: Tensor | None = None
        self.batch_idx = 0
        self._in_batch = False
        self._window_open = False
        self._stepped = False
        self._steps_seen = False
        self._flag_known = False
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
        self.reshard()
        return [(_plain_name(name), parameter) for name, parameter in self.module.named_parameters()]

    @property
    def module(self) -> pl.LightningModule:
        """The model, from train start on."""
        assert self._module is not None
        return self._module

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
        if self.buffers is None:
            self.buffers = BufferBackup(self.module)

    def reshard(self) -> None:
        """Give FSDP2 modules the parameters that the optimizer knows, which they have not after a validation."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def base_rates(self) -> Iterator[None]:
        """While it lasts, ``group["lr"]`` is the base rate; then the one of the next step again."""
        for step in self.steps.values():
            step.rates.restore()
        yield
        self._show_rates()

    def guard_checkpoints(self) -> None:
        """Ask that ``ModelCheckpoint`` write no state that is not finite."""
        self._gate = self._gate or CheckpointGate(self.trainer, self._refuses_checkpoint)

    def state_was_replaced(self) -> None:
        """The state of training has gone back to a snapshot: forget what was taken from the state before."""
        self._window_open = False
        self._show_rates()

    def least(self, number: int) -> int:
        """The least of the processes' numbers."""
        if not self.distributed:
            return number
        least = torch.tensor(number, device=self.trainer.strategy.root_device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)

    def gather(self, told: T) -> list[T]:
        """What each process tells, by rank."""
        if not self.distributed:
            return [told]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, told)
        return gathered

    def find_nonfinite(self, state: SnapshotRing | CheckpointRing) -> Nonfinite | None:
        """What is not finite in the state of training, as the first process tells it that has something so."""
        self.reshard()
        names = _flagged_names(*state.nonfinite())
        if not self.trainer.strategy.reduce_boolean_decision(bool(names), all=False):
            return None
        told = self.gather(names)
        rank = next((rank for rank, each in enumerate(told) if each), 0)
        return Nonfinite(tuple(told[rank]), rank, everywhere=all(each == told[rank] for each in told))

    def report_step(self, record: StepRecord, action: str, evidence: dict[str, float | str]) -> None:
        """Tell every callback that a step was not applied; besides the evidence, whether it was found here."""
        seen = {
            "loss": record.loss,
            "grad_norm": record.norm,
            "votes": ", ".join(record.votes),
            "found_here": float(record.found_here),
            **evidence,
        }
        if self.distributed:
            seen["own_loss"] = record.own_loss
        where = record.global_step, record.epoch, record.batch_idx, self.trainer.global_rank
        self.report(Incident(*where, kind=record.kind, evidence=seen, action=action, optimizer=record.optimizer))

    def incident(self, kind: str, evidence: dict[str, float | str], action: str, rank: int = 0) -> Incident:
        """An incident that concerns training as a whole, here and now."""
        trainer = self.trainer
        where = trainer.global_step, trainer.current_epoch, self.batch_idx, rank
        return Incident(*where, kind=kind, evidence=evidence, action=action)

    def report(self, incident: Incident) -> None:
        """Tell every callback of an intervention."""
        for callback in self.callbacks:
            callback.on_incident(incident)

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
        if self._gate is not None:
            self.reshard()
            self._state = SnapshotRing(module, list(self.steps), averaged=averaged_models(self.trainer))
        for callback in self.callbacks:
            callback.begin_training(self)
        self._show_rates()

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """A batch starts: at a window's first micro-batch the buffers are backed up."""
        for step in self.steps.values():
            step.abandon()
        self.batch_idx = batch_idx
        self._in_batch = True
        self._stepped = self._flag_known = self._waited = False
        if self._module is not None and not self._module.automatic_optimization:
            window_begins = self._loss is None  # nothing was backpropagated since the last step
        else:
            # Lightning zeroes the gradients by the same rule, also where an epoch ends inside a window.
            window_begins = batch_idx % self.trainer.accumulate_grad_batches == 0
        for callback in self.callbacks:
            callback.tamper(batch, batch_idx)
        if batch_idx == 0 and self.buffers is not None:
            self.buffers.refresh()
        window_begins = window_begins or not self._window_open
        if window_begins:
            self._open_window()
        for callback in self.callbacks:
            callback.look_at(batch, batch_idx, window_begins)

    def note_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to that of the step."""
        for callback in self.callbacks:
            callback.tamper_with_loss(loss)
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
            self.steps[wrapped].measure(loss, self.batch_idx)

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

    def record(self, record: PendingRecord, flagged: bool) -> None:
        """Keep a finished step's numbers on the device until they are read; soon if the host knows of a flag."""
        self._flag_known = self._flag_known or flagged
        self._log.add(record)

    def end_batch(self) -> None:
        """Log what is due, account for what is known, and stop a run that has diverged."""
        if self._in_batch:
            self._close_batch()
        if self._stepped:
            self._stepped = False
            for callback in self.callbacks:
                callback.after_batch(self)
        self._raise_if_diverged()

    def end_epoch(self) -> None:
        """Account for all steps of the epoch."""
        self.settle()
        self._raise_if_diverged()
        if self.steps and not self._steps_seen and not self._warned_of_bypass:
            self._warn_of_bypass("no step of an optimizer was seen in a whole epoch")

    def catch_up(self) -> None:
        """Account for what can be known, for somebody who looks at a counter: maybe in one of several processes only.

        What they decide from the steps they know of they must decide at the same time, so there it has to wait.
        """
        if self._released or not self.distributed:
            self.settle()

    def settle(self) -> None:
        """Account for every finished step, waiting for the device if need be; to be called on every process."""
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
        self._finish()

    def interrupt(self, exception: BaseException) -> None:
        """An exception ends training: account for the steps before, and let go of the optimizers."""
        # After an error of the device another read would fail too, and hide it.
        if isinstance(exception, TrainingDivergedError) or not isinstance(exception, RuntimeError):
            self.settle()
        if not isinstance(exception, TrainingDivergedError):
            self.distributed = False  # others may know nothing of it, and would be waited for in vain
        self._finish()

    def release(self) -> None:
        """Put the learning rates back and let go of the optimizers."""
        for step in self.steps.values():
            step.close()
        self.steps.clear()
        self.buffers = None
        self._released = True

    def open_gate(self) -> None:
        """Let ``ModelCheckpoint`` write whatever it likes."""
        if self._gate is not None:
            self._gate.remove()
        self._state = None

    def note_unseen_step(self, optimizer: Optimizer) -> None:
        """An optimizer steps although Lightning's hooks did not announce it."""
        if self._warned_of_bypass or not self._in_batch:
            return
        # torch.distributed.checkpoint makes an optimizer's state by a step with all rates at zero.
        if any(group.get("lr", 1.0) for group in optimizer.param_groups):
            self._warn_of_bypass("an optimizer stepped without Lightning's knowledge")

    # ---- private

    def _finish(self) -> None:
        if self._module is not None and not self._released:
            for callback in self.callbacks:
                callback.finish_training(self)
        self.release()

    def _refuses_checkpoint(self) -> bool:
        if self._state is None:
            return False
        found = self.find_nonfinite(self._state)
        if found is None:
            return False
        step = self.trainer.global_step
        if step != self._refused_at:  # there may be several files to one state
            self._refused_at = step
            rank_zero_warn(f"No checkpoint was written at step {step}: {found} is not finite.")
            evidence: dict[str, float | str] = {"nonfinite": ", ".join(found.names)}
            self.report(self.incident("checkpoint_refused", evidence, "no checkpoint was written", found.rank))
        return True

    def _close_batch(self) -> None:
        self._in_batch = False
        for step in self.steps.values():
            step.finish_if_over()
        if not self._stepped:
            return
        due = [callback for callback in self.callbacks if callback.logs_now(self)]
        wanted = self._flag_known or any(callback.wants_accounts(self) for callback in self.callbacks)
        if due or wanted or len(self._log) >= _MOST_PENDING_RECORDS:
            self._log.send(due, self.x)
            if wanted or not self._waited:
                self._log.deliver()

    def _show_rates(self) -> None:
        """Write the rates of the next step where that is allowed."""
        for step in self.steps.values():
            if self.shows_rates(step):
                step.scale_rates()

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


class Nonfinite(NamedTuple):
    """What is not finite in the state of training.

    Attributes:
        names: Names of tensors.
        rank: The process that has them.
        everywhere: Whether all processes have them.
    """

    names: tuple[str, ...]
    rank: int
    everywhere: bool

    def __str__(self) -> str:
        if not self.names:
            return "the state of another process"
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more}{'' if self.everywhere else f' on rank {self.rank}'}"


def _flagged_names(names: Sequence[str], flags: Tensor) -> list[str]:
    """The names whose flag is set; waits for the device."""
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


def _plain_name(name: str) -> str:
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name
