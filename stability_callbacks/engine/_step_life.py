"""The life of one optimizer's step: measured, judged, acted on inside ``optimizer.step``, and over."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from stability_callbacks.engine._hooks import Participants
from stability_callbacks.engine._optimizer_hooks import OptimizerHooks, obeys_found_inf
from stability_callbacks.engine._records import PendingRecord
from stability_callbacks.engine._step import OptimizerStep
from stability_callbacks.engine._training import Training
from stability_callbacks.engine._training_state import loss_scaler
from stability_callbacks.engine._verdict import Verdict, reach_verdict
from stability_callbacks.gradient_pass import GradientPass
from stability_callbacks.snapshots import GroupWrites

__all__ = ["StepLife"]


class StepLife:
    """Takes the steps of one optimizer through their life.

    Args:
        step: The optimizer's current step.
        training: The run.
        participants: The callbacks.
        keep: Takes the record of a finished step, and whether the host knows of a flag that is set in it.
        on_wait: Called when the host has just waited for a device.
        on_unseen: Called when the optimizer steps and nobody announced it.
    """

    def __init__(
        self,
        step: OptimizerStep,
        training: Training,
        participants: Participants,
        keep: Callable[[PendingRecord, bool], None],
        on_wait: Callable[[torch.device], None],
        on_unseen: Callable[[Optimizer], None],
    ) -> None:
        self.step = step
        self._training = training
        self._participants = participants
        self._keep = keep
        self._on_wait = on_wait
        self._on_unseen = on_unseen
        self._writes = GroupWrites(step.optimizer, step.written_entries)
        self._hooks = OptimizerHooks(step.optimizer, self.act, self._after_arithmetic, self.abandon)

    @torch.no_grad()
    def measure(self, loss: Tensor | None) -> None:
        """Measure the gradients, let the callbacks observe and vote, and reach the verdict. Changes no gradient.

        Args:
            loss: The sum of the losses of the step's micro-batches, 0-dim, with its loss scale; None if not seen.
        """
        self.abandon()
        step, training, participants = self.step, self._training, self._participants
        trainer = training.trainer
        step.measured = True
        step.global_step, step.batch_idx = trainer.global_step, training.batch_idx
        scale = _loss_scale(trainer)
        step.loss = step.own_loss = loss if loss is None or scale is None else loss / scale
        if training.processes.several and any(each.compares_losses() for each in participants["compares_losses"]):
            step.loss = training.processes.mean(step.loss)
        step.loss_scale = scale
        carries_scale = scale is not None and getattr(step.optimizer, "_step_supports_amp_scaling", False)
        step.gradients = GradientPass(
            step.parameters, scale.reciprocal() if scale is not None and carries_scale else None
        )
        if step.gradients:
            for norm_type in {2.0}.union(*(each.norm_types() for each in participants["norm_types"])):
                step.gradients.norms(norm_type)
            for callback in participants["observe"]:
                callback.observe(step)
        votes = [vote for callback in participants["vote"] for vote in callback.vote(step)]
        watches = [watch for callback in participants["watch"] for watch in callback.watch(step)]
        step.verdict = reach_verdict(votes, watches, training.processes)
        if step.skip is None or (
            step.gradients and obeys_found_inf(step.optimizer) and training.window.restorable_on_device()
        ):
            return
        step.verdict.read()
        self._on_wait(step.skip.device)
        if step.skipped:
            training.window.restore()
        elif not step.gradients:
            step.verdict = Verdict()  # there was nothing to apply, so nothing to learn from

    @torch.no_grad()
    def act(self) -> bool:
        """Carry the verdict out, right before the optimizer's arithmetic.

        Returns:
            Whether the arithmetic may run.
        """
        step, participants = self.step, self._participants
        if not step.measured:
            self._on_unseen(step.optimizer)
            return True
        skips = bool(step.skipped)
        if step.acted:
            return not skips
        step.acted = True
        applies = bool(step.gradients) and not skips
        if skips and step.gradients:
            for _, parameter in step.gradients.parameters:
                parameter.grad = None
        if step.skip is not None and step.skipped is None:
            self._hooks.skip_where(step.skip)
        for callback in participants["clip"] if applies else ():
            callback.clip(step)
        self._training.scale_rates(step)
        for callback in participants["before_update"]:
            callback.before_update(step)
        for callback in participants["penalize"] if applies else ():
            callback.penalize(step)
        self._writes.look()
        return not skips

    def finish_if_over(self) -> None:
        """Finish a step that Lightning has counted: its ``step()`` has returned, or a loss scaler left it out."""
        if self.step.measured and self._training.trainer.global_step > self.step.global_step:
            self._finish()

    def drop(self, loss: Tensor) -> None:
        """Judge a step by its loss alone, and finish it without an update.

        Args:
            loss: The loss, 0-dim.
        """
        self.measure(loss)
        if self.step.skip is not None and self.step.skipped is None:
            self.step.verdict.read()
        self._finish()

    def abandon(self) -> None:
        """Forget a step that an exception ended, and undo what was for this step only."""
        self._undo()
        self.step.forget()

    def close(self) -> None:
        """Let go of the optimizer."""
        self.abandon()
        self._hooks.remove()

    def _after_arithmetic(self) -> None:
        if self.step.acted:
            self._writes.compare()
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """Undo what was for this step only, restore buffers after a skip, and write the step's record."""
        step, training, participants = self.step, self._training, self._participants
        self._undo()
        for callback in participants["after_update"] if step.acted else ():
            callback.after_update(step)
        training.window.end(step.skip, step.skipped)
        if step.gradients or step.skipped:
            record = step.pending_record(training.trainer.current_epoch)
            for callback in participants["on_step_finished"]:
                callback.on_step_finished(step, record)
            self._keep(record, step.verdict.flagged)
        for callback in participants["on_step_attempted"]:
            callback.on_step_attempted(step)
        step.forget()

    def _undo(self) -> None:
        self._hooks.undo()
        self.step.rates.restore()


def _loss_scale(trainer: pl.Trainer) -> Tensor | None:
    """The loss scale in force, 0-dim on the trainer's device, without waiting for it; None if there is no scaler."""
    scaler = loss_scaler(trainer)
    if scaler is None:
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
    return scale
