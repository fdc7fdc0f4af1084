"""A training run, as callbacks may look at it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import lightning.pytorch as pl
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stability_callbacks._names import plain_name
from stability_callbacks.diagnosis import Incident
from stability_callbacks.engine._lightning import batches_that_stepped, log_every_n_steps, training_results
from stability_callbacks.engine._logger_writes import LoggerWrites
from stability_callbacks.engine._processes import Processes
from stability_callbacks.engine._records import StepRecord
from stability_callbacks.engine._step import OptimizerStep
from stability_callbacks.engine._window import AccumulationWindow
from stability_callbacks.snapshots import BufferBackup

__all__ = ["StepError", "Training"]


class StepError(NamedTuple):
    """An exception in a training step.

    Attributes:
        text: The exception in words, with what tells that numbers caused it.
        source: The user's line that raised it, where there is one.
    """

    text: str
    source: str | None

    def evidence(self) -> dict[str, float | str]:
        """The same for the record."""
        return {"exception": self.text, **({} if self.source is None else {"raised_at": self.source})}


class Training:
    """What is known of a run, and what concerns it as a whole.

    Args:
        trainer: The trainer.
        module: The model.
        loggers: Writes to the trainer's loggers.
        report: Tells every callback of an incident.
        multipliers: The factors that callbacks want for the learning rates in an optimizer's next step.
        statistics: Gives what callbacks have learned, and must go back with a snapshot.
        forget_failures: Lets callbacks count failures anew, before the last good state is saved.

    Attributes:
        trainer: The trainer.
        module: The model.
        processes: The processes that train together.
        run: Names this fit in the files that it writes, the same on every process.
        steps: The current step of each optimizer.
        window: The micro-batches of the current step.
        batch_idx: The index of the current batch.
        errors: Exceptions that bad numbers caused, by ``trainer.global_step``, until their steps are on record.
        causes: What was found to be the cause of an incident, by optimizer and step, in words.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loggers: LoggerWrites,
        report: Callable[[Incident], None],
        multipliers: Callable[[OptimizerStep], list[Sequence[float]]],
        statistics: Callable[[], list[Stateful]],
        forget_failures: Callable[[], None] = lambda: None,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.processes = Processes(trainer)
        # Not from `random`, whose state belongs to the user's run.
        self.run: str = trainer.strategy.broadcast(secrets.token_hex(4))
        self.steps: dict[Optimizer, OptimizerStep] = {}
        self.window = AccumulationWindow(
            module,
            manual=not module.automatic_optimization,
            results=lambda: training_results(trainer),
            trained=lambda: {id(each) for step in self.steps.values() for _, each in step.parameters},
        )
        self.loggers = loggers
        self.report = report
        self.batch_idx = 0
        self.errors: dict[int, StepError] = {}
        self.causes: dict[tuple[str | None, int], str] = {}
        self.statistics = statistics
        self.forget_failures = forget_failures
        self._multipliers = multipliers

    # ---- where it stands

    @property
    def logged_step(self) -> int:
        """Where the current step lies on the x-axis of metrics, the one that ``self.log`` uses."""
        return batches_that_stepped(self.trainer)

    @property
    def log_every_n_steps(self) -> int:
        """The trainer's cadence; 0 for never."""
        return log_every_n_steps(self.trainer)

    def is_logging_step(self, every_n_steps: int | None = None) -> bool:
        """Whether metrics are due, by the trainer's cadence or a given one; counted in optimizer steps."""
        cadence = self.log_every_n_steps if every_n_steps is None else every_n_steps
        return bool(cadence > 0 and (self.logged_step + 1) % cadence == 0)

    # ---- the model

    @property
    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The model's parameters, tied ones once, named without the segments that wrappers add."""
        self.reshard()
        return [(plain_name(name), parameter) for name, parameter in self.module.named_parameters()]

    @property
    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """The model's buffers, shared ones once, named likewise."""
        return [(plain_name(name), buffer) for name, buffer in self.module.named_buffers()]

    @property
    def buffers(self) -> BufferBackup | None:
        """The backup of the model's buffers, if a callback asked for one."""
        return self.window.buffers

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the parameters only, as under FSDP2."""
        return any(isinstance(parameter, DTensor) for parameter in self.module.parameters())

    def reshard(self) -> None:
        """Give FSDP2 modules the parameters that the optimizer knows, which they have not after a validation."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- learning rates

    def scale_rates(self, step: OptimizerStep) -> None:
        """Put the multiplied learning rates of an optimizer in force, until they are restored."""
        factors = self._multipliers(step)
        if factors:
            products = [1.0] * len(step.optimizer.param_groups)
            for multipliers in factors:
                products = [product * multiplier for product, multiplier in zip(products, multipliers, strict=True)]
            step.rates.multiply(products)

    @contextmanager
    def effective_rates(self) -> Iterator[None]:
        """While it lasts, ``group["lr"]`` shows the rate of the next step, where no scheduler sets the base rate."""
        shown = [step for step in self.steps.values() if not step.measured and not self._is_scheduled(step)]
        for step in shown:
            self.scale_rates(step)
        try:
            yield
        finally:
            for step in shown:
                step.rates.restore()

    def _is_scheduled(self, step: OptimizerStep) -> bool:
        known = any(config.scheduler.optimizer is step.optimizer for config in self.trainer.lr_scheduler_configs)
        return known or any("initial_lr" in group for group in step.optimizer.param_groups)

    # ---- what happened

    def state_was_replaced(self) -> None:
        """The state of training has gone back to a snapshot: forget what was taken from the state before."""
        self.window.forget()

    def incident(self, kind: str, evidence: dict[str, float | str], action: str, rank: int = 0) -> Incident:
        """An incident that concerns training as a whole, here and now."""
        where = self.trainer.global_step, self.trainer.current_epoch, self.batch_idx, rank
        return Incident(*where, kind=kind, evidence=evidence, action=action)

    def step_incident(self, record: StepRecord, action: str, evidence: dict[str, float | str]) -> Incident:
        """An incident of one step; besides the evidence it says whether it was found here."""
        seen = {
            "loss": record.loss,
            "grad_norm": record.norm,
            "votes": ", ".join(record.votes),
            "found_here": float(record.found_here),
            **evidence,
        }
        if self.processes.several:
            seen["own_loss"] = record.own_loss
        if (error := self.errors.pop(record.global_step, None)) is not None:
            seen.update(error.evidence())
        where = record.global_step, record.epoch, record.batch_idx, self.processes.rank
        return Incident(*where, kind=record.kind, evidence=seen, action=action, optimizer=record.optimizer)
