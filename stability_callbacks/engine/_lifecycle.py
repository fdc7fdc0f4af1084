"""One object per trainer that takes its steps through their life, on behalf of all our callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import LBFGS, Optimizer

from stability_callbacks._identity import same_objects
from stability_callbacks.diagnosis import Incident
from stability_callbacks.engine._checkpoint_gate import CheckpointGate
from stability_callbacks.engine._hooks import Participants, StepHooks
from stability_callbacks.engine._lightning import (
    MisconfigurationException,
    batch_is_processed,
    both,
    callbacks_of,
    check_private_names,
    is_placeholder,
    should_accumulate,
    untoggle_optimizers,
    unwrapped,
)
from stability_callbacks.engine._logger_writes import LoggerWrites
from stability_callbacks.engine._nonfinite import find_nonfinite
from stability_callbacks.engine._optimizer_hooks import several_closures
from stability_callbacks.engine._optimizer_watch import OptimizerWatch
from stability_callbacks.engine._rate_display import RateDisplay
from stability_callbacks.engine._records import PendingRecord
from stability_callbacks.engine._scalar_log import ScalarLog
from stability_callbacks.engine._step import OptimizerStep, optimizer_labels
from stability_callbacks.engine._step_errors import StepErrors
from stability_callbacks.engine._step_life import StepLife
from stability_callbacks.engine._training import StepError, Training
from stability_callbacks.engine._training_state import averaged_models
from stability_callbacks.engine._usage import warn_of_anomaly_detection, warn_of_doubles
from stability_callbacks.errors import TrainingDivergedError
from stability_callbacks.snapshots import SnapshotRing

__all__ = ["StepLifecycle"]

# Step records wait on the device for the next log step, or until there are this many.
_MOST_PENDING_RECORDS = 4096


class StepLifecycle:
    """Translates Lightning's hooks into ours, see :class:`~stability_callbacks.engine.StepHooks`.

    The gradients are measured once, all detectors vote, one verdict is reached, and it is acted on inside
    ``optimizer.step``. Whatever the callbacks' order in the trainer's list, they are called in that of their phases.

    Args:
        trainer: The trainer. Of its callbacks those count that are ``StepHooks``.

    Attributes:
        trainer: The trainer.
        driver: The first of the callbacks in the trainer's list, which passes Lightning's hooks on.
        released: Whether training is over.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        callbacks = [callback for callback in callbacks_of(trainer) if isinstance(callback, StepHooks)]
        self.trainer = trainer
        self.driver: object = callbacks[0]
        self.released = False
        self._participants = Participants(callbacks)
        self._loggers = LoggerWrites(trainer)
        self._log = ScalarLog(self._participants, self._loggers)
        self._training: Training | None = None
        self._lives: dict[Optimizer, StepLife] = {}
        self._begun = False
        self._undo: list[Callable[[], None]] = []
        self._gate: CheckpointGate | None = None
        self._errors: StepErrors | None = None
        self._state: SnapshotRing | None = None
        self._refused_at: int | None = None
        self._in_batch = False
        self._stepped = False
        self._steps_seen = False
        self._flag_known = False
        self._waited = False
        self._warned_of_bypass = False

    @property
    def training(self) -> Training:
        """The run, from train start on."""
        assert self._training is not None
        return self._training

    # ---- the hooks, in the order in which they fire

    def start(self, module: pl.LightningModule) -> None:
        """Reach into the optimizers and let the callbacks prepare."""
        self._refuse_what_cannot_work()
        self._training = training = Training(
            self.trainer,
            module,
            self._loggers,
            report=self._report,
            multipliers=self._multipliers,
            statistics=self._statistics,
            forget_failures=self._forget_failures,
        )
        warn_of_doubles(self._participants)
        warn_of_anomaly_detection(self.trainer)
        self._follow_optimizers()
        if not any(parameter.requires_grad for step in training.steps.values() for _, parameter in step.parameters):
            rank_zero_warn(
                "No optimizer has a trainable parameter, so the stability callbacks have nothing to watch or protect."
            )
        participants = self._participants
        for callback in participants["prepare"]:
            callback.prepare(training)
        if participants["vote"]:
            training.window.protect(any(each.protects_buffers() for each in participants["protects_buffers"]))
        if any(callback.guards_checkpoints() for callback in participants["guards_checkpoints"]):
            self._gate = self._gate or CheckpointGate(self.trainer, self._refuses_checkpoint)
            self._state = self._look_at_state()
        self._errors = StepErrors(
            training,
            catches=any(each.votes_on_nonfinite() for each in participants["votes_on_nonfinite"]),
            on_error=self._report_error,
            drop_step=self._drop_step,
        )
        for callback in participants["begin_training"]:
            callback.begin_training(training)
        self._undo = [
            RateDisplay(training).remove,
            OptimizerWatch(self.trainer, self._notice_before_step).remove,
        ]
        self._begun = True

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """A batch starts: at a window's first micro-batch the buffers are backed up."""
        for life in self._lives.values():
            life.abandon()
        self._notice_changes()
        training = self.training
        training.batch_idx = batch_idx
        self._in_batch = True
        self._stepped = self._flag_known = self._waited = False
        for callback in self._participants["inject_before_forward"]:
            callback.inject_before_forward(batch, batch_idx)
        first = training.window.on_batch(batch_idx, self.trainer.accumulate_grad_batches)
        for callback in self._participants["on_micro_batch"]:
            callback.on_micro_batch(batch, batch_idx, first)

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to that of the step."""
        for callback in self._participants["inject_before_backward"]:
            callback.inject_before_backward(loss)
        loss = loss.detach()
        # Lightning takes a loss of shape [1] too, and `manual_backward(loss, gradient=...)` any. NaN stays visible.
        self.training.window.add_loss(loss.mean() if loss.dim() else loss)

    def on_after_backward(self) -> None:
        """A micro-batch's backward pass is over."""
        if self.training.module.automatic_optimization and should_accumulate(self.trainer):
            self.training.window.pause()

    def measure(self, optimizer: Optimizer) -> None:
        """Measure, vote and decide; see :meth:`StepLife.measure`."""
        life = self._lives.get(unwrapped(optimizer))
        if life is None:
            return
        if life.step.parameters_changed():  # in the forward pass
            self._tell_of_changes()
        for each in self._lives.values():
            each.finish_if_over()
        self._stepped = self._steps_seen = True
        life.measure(self.training.window.take_loss())

    def end_batch(self) -> None:
        """Log what is due, read the records that are known, and stop a run that has diverged."""
        if self._in_batch:
            self._close_batch()
        if self._stepped:
            self._stepped = False
            self._tell()
            for callback in self._participants["after_batch"]:
                callback.after_batch(self.training)
        self._raise_if_diverged()

    def end_epoch(self) -> None:
        """Read the records of all steps of the epoch."""
        self.read_records()
        self._tell()
        self._raise_if_diverged()
        if self._lives and not self._steps_seen and not self._warned_of_bypass:
            self._warn_of_bypass("no step of an optimizer was seen in a whole epoch")

    def close(self) -> None:
        """Training has ended: read all records and let go of the optimizers."""
        self.read_records()
        self._finish()

    def interrupt(self, exception: BaseException) -> None:
        """An exception ends training: read the records of the steps before, and let go of the optimizers."""
        # After an error of the device another read would fail too, and hide it.
        if isinstance(exception, TrainingDivergedError) or not isinstance(exception, RuntimeError):
            self.read_records()
        if not isinstance(exception, TrainingDivergedError) and self._training is not None:
            self._training.processes.part()
        self._finish()

    def open_gate(self) -> None:
        """Let ``ModelCheckpoint`` write whatever it likes."""
        if self._gate is not None:
            self._gate.remove()
        self._state = None

    # ---- records

    def read_records(self, everywhere: bool = True) -> None:
        """Let callbacks read the record of every finished step, waiting for the device if need be.

        Args:
            everywhere: Whether all processes do so now. If not, as where somebody looks at a counter, nothing is read
                while there are several: what they decide from records they must decide at the same time.
        """
        if not everywhere and not self.released and self._training is not None and self._training.processes.several:
            return
        if self._in_batch and batch_is_processed(self.trainer):
            self._close_batch()  # somebody saves a checkpoint in `on_train_batch_end` before our own is called
        for life in self._lives.values():
            life.finish_if_over()
        self._log.send()
        self._log.deliver()

    # ---- private

    def _notice_before_step(self) -> None:
        """An optimizer is about to step: notice what has changed since the batch started."""
        alone = self.trainer.lightning_module.automatic_optimization and self.trainer.accumulate_grad_batches == 1
        if self._notice_changes() and alone:
            self.training.window.take()  # no forward pass has written anything yet

    def _notice_changes(self) -> bool:
        """Reach into optimizers that are new, and let callbacks know of these and of new parameters.

        Returns:
            Whether there was something; to look costs a walk over the parameters on the host.
        """
        if self.released or self._training is None or not self._begun:
            return False
        replaced = self._follow_optimizers()
        grown = [step for step in self._training.steps.values() if step.parameters_changed()]
        if replaced or grown:
            self._tell_of_changes()
        return replaced or bool(grown)

    def _follow_optimizers(self) -> bool:
        """Attach to the trainer's optimizers as they are now, and let go of others.

        A new optimizer takes the place of the one that stood at its position: what callbacks keep of that goes on.

        Returns:
            Whether others are there than before.
        """
        training = self.training
        optimizers = [each for each in map(unwrapped, self.trainer.optimizers) if not is_placeholder(each)]
        if same_objects(optimizers, self._lives):
            return False
        for life in self._lives.values():
            life.finish_if_over()
            life.close()
        self._lives.clear()
        training.steps.clear()
        several = len(optimizers) > 1
        for index, (optimizer, label) in enumerate(zip(optimizers, optimizer_labels(optimizers), strict=True)):
            if isinstance(optimizer, LBFGS):
                raise several_closures(optimizer)
            step = OptimizerStep(optimizer, index, label, several, lambda: training.named_parameters)
            training.steps[optimizer] = step
            self._lives[optimizer] = StepLife(
                step,
                training,
                self._participants,
                keep=self._keep_record,
                on_wait=self._on_wait,
                on_unseen=self._on_unseen_step,
            )
        return True

    def _tell_of_changes(self) -> None:
        training = self.training
        for step in training.steps.values():
            step.parameters_changed()
        training.window.refresh()  # new parameters come with modules that may have buffers
        if self._state is not None:
            self._state = self._look_at_state()
        for callback in self._participants["on_optimizers_changed"]:
            callback.on_optimizers_changed(training)

    def _look_at_state(self) -> SnapshotRing:
        training = self.training
        training.reshard()
        return SnapshotRing(training.module, list(training.steps), averaged=averaged_models(self.trainer))

    def _keep_record(self, record: PendingRecord, flagged: bool) -> None:
        """Keep a finished step's numbers on the device until they are read; soon if the host knows of a flag."""
        self._flag_known = self._flag_known or flagged
        self._log.add(record)

    def _on_wait(self, device: torch.device) -> None:
        """The host has just waited for the device, so whatever was sent before has arrived."""
        if device.type != "cpu":
            self._waited = True
            self._log.deliver()

    def _on_unseen_step(self, optimizer: Optimizer) -> None:
        """An optimizer steps although Lightning's hooks did not announce it."""
        if self._warned_of_bypass or not self._in_batch:
            return
        # torch.distributed.checkpoint makes an optimizer's state by a step with all rates at zero.
        if not all(group.get("lr") == 0 for group in optimizer.param_groups):
            self._warn_of_bypass("an optimizer stepped without Lightning's knowledge")

    def _report_error(self, error: StepError) -> None:
        training = self.training
        rank = training.processes.rank
        training.report(training.incident("exception", error.evidence(), "training ended", rank))

    def _drop_step(self) -> None:
        """An exception cut a step of manual optimization short: drop what there is of it, and put it on record."""
        training = self.training
        life = next(iter(self._lives.values()))
        for each in self._lives.values():
            each.finish_if_over()
        self._stepped = self._steps_seen = True
        training.window.take_loss()
        untoggle_optimizers(training.module)
        life.drop(torch.full((), float("nan"), device=training.processes.device))
        for step in training.steps.values():
            for _, parameter in step.parameters:
                parameter.grad = None

    def _report(self, incident: Incident) -> None:
        for callback in self._participants["on_incident"]:
            callback.on_incident(incident)

    def _multipliers(self, step: OptimizerStep) -> list[Any]:
        factors = (callback.rate_multipliers(step) for callback in self._participants["rate_multipliers"])
        return [each for each in factors if each is not None]

    def _statistics(self) -> list[Stateful]:
        return [item for callback in self._participants["statistics"] for item in callback.statistics()]

    def _forget_failures(self) -> None:
        for callback in self._participants["forget_failures"]:
            callback.forget_failures()

    def _finish(self) -> None:
        if self._training is not None and not self.released:
            for callback in self._participants["finish_training"]:
                callback.finish_training(self._training)
        if self._errors is not None:
            self._errors.remove()
        for life in self._lives.values():
            life.close()
        self._lives.clear()
        for undo in self._undo:
            undo()
        self._undo = []
        if self._training is not None:
            self._training.steps.clear()
            self._training.window.release()
        self.released = True

    def _refuses_checkpoint(self) -> bool:
        if self._state is None:
            return False
        training = self.training
        found = find_nonfinite(training, self._state)
        if found is None:
            return False
        step = self.trainer.global_step
        if step != self._refused_at:  # there may be several files to one state
            self._refused_at = step
            rank_zero_warn(f"No checkpoint was written at step {step}: {found} is not finite.")
            evidence: dict[str, float | str] = {"nonfinite": ", ".join(found.names)}
            training.report(training.incident("checkpoint_refused", evidence, "no checkpoint was written", found.rank))
        return True

    def _close_batch(self) -> None:
        self._in_batch = False
        for life in self._lives.values():
            life.finish_if_over()
        if not self._stepped:
            self._close_batch_without_step()
            return
        training, participants = self.training, self._participants
        due = [callback for callback in participants.logging if callback.logs_now(training)]
        wanted = self._flag_known or any(each.needs_records(training) for each in participants["needs_records"])
        if due or wanted or len(self._log) >= _MOST_PENDING_RECORDS:
            self._log.send(due, training.logged_step)
            if wanted or not self._waited:
                self._log.deliver()

    def _close_batch_without_step(self) -> None:
        """Undo what a bad forward pass wrote to buffers, if no step will judge it; else see that it is judged."""
        training = self.training
        window = training.window
        if window.went_backward():
            if not training.module.automatic_optimization:
                window.pause()
            return
        if window.buffers is None:
            return
        names, flags = window.buffers.nonfinite()
        if not names:
            return
        if training.processes.several:
            flags = training.processes.any_of_each(flags.to(training.processes.device))
        bad = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
        if bad:
            window.restore()
            evidence: dict[str, float | str] = {"nonfinite_buffers": ", ".join(bad)}
            training.report(training.incident("nonfinite", evidence, "buffers were put back"))

    def _warn_of_bypass(self, what: str) -> None:
        self._warned_of_bypass = True
        rank_zero_warn(
            f"The stability callbacks see and protect nothing here: {what}. In manual optimization, step the "
            "optimizers that `self.optimizers()` returns (not `optimizer.optimizer`) and call "
            "`self.manual_backward(loss)`."
        )

    def _tell(self) -> None:
        """Let incidents be examined, and then announced with what was found."""
        for callback in self._participants["examine"]:
            callback.examine(self.training)
        for callback in self._participants["announce"]:
            callback.announce(self.training)

    def _raise_if_diverged(self) -> None:
        for callback in reversed(self._participants["divergence"]):  # the later the phase, the more it knows
            if reason := callback.divergence():
                raise TrainingDivergedError(reason)

    def _refuse_what_cannot_work(self) -> None:
        check_private_names(self.trainer)
        strategy = self.trainer.strategy
        if isinstance(strategy, both(FSDPStrategy)):
            raise MisconfigurationException(
                "The stability callbacks do not work with FSDPStrategy (FSDP1), whose flattened shards hide the "
                "parameters' norms. Use ModelParallelStrategy with `fully_shard` (FSDP2) in `configure_model`."
            )
        if strategy.handles_gradient_accumulation:
            raise MisconfigurationException(
                f"The stability callbacks do not work with {type(strategy).__name__}, which keeps gradients and "
                "optimizer steps to itself. Use DDPStrategy or ModelParallelStrategy."
            )
