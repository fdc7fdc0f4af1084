"""The callback that puts faults into training, to see what becomes of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from stability_callbacks._validation import check_instance
from stability_callbacks.activations import named_modules
from stability_callbacks.engine import STATE_VERSION, OptimizerStep, Phase, StabilityCallback, StepClock, Training
from stability_callbacks.engine._lightning import MisconfigurationException, should_accumulate
from stability_callbacks.faults import (
    Fault,
    GradientMarks,
    Injection,
    OutputTrap,
    draw_spot,
    named_optimizer_state,
    named_tensors,
)

__all__ = ["FaultInjector"]

_log = logging.getLogger(__name__)

# Injections are announced one by one up to this number, then only when it has grown tenfold.
_ANNOUNCED_INJECTIONS = 10

_BEFORE_FORWARD = ("buffer", "input", "optimizer_state", "weight")

_WHY_NOTHING_WAS_HIT = {
    "activation": "no module that it may hit gave a floating-point output; hooks on compiled modules are not called",
    "buffer": "no buffer that it may hit holds floating-point numbers",
    "gradient": "no parameter that it may hit got a gradient",
    "input": "the batch holds no floating-point tensor that it may hit",
    "loss": "there was no backward pass",
    "optimizer_state": "the optimizers keep no such state; none has any before its first step",
    "weight": "no parameter that it may hit holds floating-point numbers",
}


class FaultInjector(StabilityCallback):
    """Puts faults into training on purpose, to rehearse what the other callbacks do about them.

    Use it before a long run, to see that guards, rollback and alarms work with your model, and in tests. Where no
    fault is due, training is bit for bit what it is without it, and so is the batch's memory once the step is over. The
    faults come before any other callback of this package looks: at the batch, the buffers, the loss, the gradients.

    Steps are those that the optimizer attempted, skipped ones included: ``trainer.global_step`` in automatic
    optimization. In manual optimization learning-rate faults go by each optimizer's own count, all others by that of
    the optimizer that has made the most steps when the batch starts. Under gradient accumulation a gradient is hit in
    the last micro-batch of the step, everything else in the first one.

    The loss is multiplied in place. In manual optimization it must not end in an operation that needs its own result in
    the backward pass, such as a bare square root: torch refuses that.

    A fault that finds nothing to hit in its step is dropped, with a warning: a module that is not called, say, or an
    optimizer that has no state yet, which is so in step 0.

    Args:
        faults: A :class:`~stability_callbacks.faults.Fault`, or a non-empty sequence of them.

    Raises:
        TypeError: If ``faults`` is something else.
        ValueError: If there is no fault.
        MisconfigurationException: At train start, if the model has nothing that a fault may hit, or there is no such
            rank; in the first step, if the batch has no floating-point tensor that a fault may hit.

    Example:
        >>> from stability_callbacks import FaultInjector, StepGuard
        >>> from stability_callbacks.faults import Fault
        >>> faults = [Fault("input", "nan", steps=[10, 20]), Fault("gradient", "inf", probability=0.01)]
        >>> callbacks = [FaultInjector(faults), StepGuard()]
        >>> callbacks[0].injected
        []

    Metrics:
        ``stability/injected_faults``: number of faults put into training so far.
    """

    phase = Phase.FAULT

    _injected: list[Injection]
    _due: list[Fault]
    _step: int | None
    _traps: list[OutputTrap]
    _undos: list[Callable[[], None]]
    _marks: GradientMarks | None

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        super().__init__()
        self.faults = _check_faults(faults)
        self._ordered = sorted(self.faults, key=repr)
        # Lightning asks for the key at every call of every hook.
        self._state_key = self._generate_state_key(faults=self.faults)
        self._rank = 0
        self._reset()

    @property
    def injected(self) -> list[Injection]:
        """The faults put into training so far, in order; on every process those of all."""
        return list(self._injected)

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {
            "version": STATE_VERSION,
            "attempted_steps": list(self._clock.attempted),
            "injected": [tuple(injection) for injection in self._injected],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.attempted = list(state_dict.get("attempted_steps", ()))
        self._injected = [Injection(*injection) for injection in state_dict.get("injected", ())]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def prepare(self, training: Training) -> None:
        self._rank = training.processes.rank
        self._step, self._inputs_checked = None, False
        self._clock.prepare(training, [])
        for fault in self.faults:
            _check_fit(fault, training)
        rank_zero_warn(f"FaultInjector puts faults into this training on purpose: {', '.join(map(repr, self.faults))}.")

    def on_optimizers_changed(self, training: Training) -> None:
        self._clock.make_room(training)

    # ---- where faults come in

    def inject_before_forward(self, batch: Any, batch_idx: int) -> None:
        if not self._inputs_checked:
            self._inputs_checked = True
            self._check_inputs(batch)
        step = max(self._clock.attempted, default=0)
        if step != self._step:
            self._step = step
            self._due = [fault for fault in self._ordered if fault.target != "learning_rate" and fault.is_due(step)]
        for fault in list(self._due):
            if fault.target in _BEFORE_FORWARD:
                self._corrupt(fault, self._candidates(fault.target, batch))
            elif fault.target == "activation":
                self._set_trap(fault)

    def inject_before_backward(self, loss: Tensor) -> None:
        for fault in self._due_now("loss"):
            self._note(fault, "")
            if fault.hits(self._rank):
                with torch.enable_grad():
                    loss.mul_(fault.factor)
        if self._due_now("gradient") and not should_accumulate(self.training.trainer):
            self._marks = GradientMarks(self.training.named_parameters)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        if self._marks is not None:
            fresh, self._marks = self._marks.fresh(), None
            for fault in self._due_now("gradient"):
                self._corrupt(fault, fresh)

    def rate_multipliers(self, step: OptimizerStep) -> Sequence[float] | None:
        if not any(fault.target == "learning_rate" for fault in self.faults):
            return None
        factors = [fault.factor for fault in self._surges(step) if fault.hits(self._rank)]
        return [math.prod(factors)] * len(step.optimizer.param_groups)

    def before_update(self, step: OptimizerStep) -> None:
        for fault in self._surges(step):
            self._record(fault, self._clock.attempted[step.index], step.label)

    def on_step_attempted(self, step: OptimizerStep) -> None:
        self._clock.attempted[step.index] += 1

    # ---- how training gets rid of them

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._remove_traps()
        if not should_accumulate(trainer):
            self._give_batches_back()
            for fault in self._due:
                rank_zero_warn(
                    f"FaultInjector found nothing to hit in step {self._step} for {fault!r}: "
                    f"{_WHY_NOTHING_WAS_HIT[fault.target]}."
                )
            self._due = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            super().on_exception(trainer, pl_module, exception)
        finally:
            self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    def host_scalars(self) -> Mapping[str, float]:
        return {"stability/injected_faults": float(len(self._injected))}

    # ---- private

    def _candidates(self, target: str, batch: Any) -> Iterable[tuple[str, Tensor]]:
        if target == "input":
            return named_tensors(batch, "batch")
        if target == "weight":
            return self.training.named_parameters
        if target == "buffer":
            return self.training.named_buffers
        return [
            named
            for step in self.training.steps.values()
            for named in named_optimizer_state(step.optimizer, step.parameters)
        ]

    def _corrupt(self, fault: Fault, candidates: Iterable[tuple[str, Tensor]]) -> None:
        assert self._step is not None
        spot = draw_spot(fault, self._step, candidates)
        if spot is None:
            return
        if fault.hits(self._rank):
            undo = spot.corrupt_(fault.factor)
            if fault.target == "input":
                self._undos.append(undo)
        self._note(fault, spot.name)

    def _set_trap(self, fault: Fault) -> None:
        assert self._step is not None
        modules = self.training.module.named_modules()
        on_hit = partial(self._note, fault)
        self._traps.append(OutputTrap(fault, self._step, modules, on_hit, armed=fault.hits(self._rank)))

    def _due_now(self, target: str) -> list[Fault]:
        return [fault for fault in self._due if fault.target == target]

    def _surges(self, step: OptimizerStep) -> list[Fault]:
        attempted = self._clock.attempted[step.index]
        return [fault for fault in self._ordered if fault.target == "learning_rate" and fault.is_due(attempted)]

    def _note(self, fault: Fault, where: str) -> None:
        assert self._step is not None
        self._due.remove(fault)
        self._record(fault, self._step, where)

    def _record(self, fault: Fault, step: int, where: str) -> None:
        self._injected.append(Injection(step, fault.target, fault.value, where, fault.rank))
        number = len(self._injected)
        if number <= _ANNOUNCED_INJECTIONS or str(number).strip("0") == "1":
            self._announce(number)

    @rank_zero_only
    def _announce(self, number: int) -> None:
        _log.warning("Injected a fault: %s. %d injected so far.", self._injected[-1], number)

    def _check_inputs(self, batch: Any) -> None:
        for fault in self.faults:
            if fault.target == "input" and draw_spot(fault, 0, named_tensors(batch, "batch")) is None:
                kinds = {name: str(tensor.dtype) for name, tensor in named_tensors(batch, "batch")}
                raise MisconfigurationException(
                    f"{fault!r} finds nothing to hit in the first batch: it needs a floating-point tensor"
                    f"{'' if fault.where is None else ' whose name fits `where`'}, and there are "
                    f"{kinds or f'no tensors in the {type(batch).__name__}'}. For indices such as tokens, "
                    'Fault("activation", where=<the name of the embedding>) comes closest.'
                )

    def _remove_traps(self) -> None:
        for trap in self._traps:
            trap.remove()
        self._traps = []

    def _give_batches_back(self) -> None:
        while self._undos:
            self._undos.pop()()

    def _let_go(self) -> None:
        self._remove_traps()
        self._give_batches_back()
        self._due, self._marks = [], None

    def _reset(self) -> None:
        self._clock = StepClock()
        self._injected, self._due, self._traps, self._undos = [], [], [], []
        self._step = self._marks = None
        self._inputs_checked = False


def _check_faults(faults: Any) -> list[Fault]:
    allowed = 'a fault, such as Fault("input", steps=10), or a non-empty sequence of them'
    if isinstance(faults, Fault):
        return [faults]
    if isinstance(faults, str) or not isinstance(faults, Sequence):
        raise TypeError(f"`faults` must be {allowed}, got {faults!r} of type {type(faults).__name__}")
    if not faults:
        raise ValueError(f"`faults` must be {allowed}, got {faults!r}")
    return [check_instance(f"faults[{index}]", fault, Fault, "a fault") for index, fault in enumerate(faults)]


def _check_fit(fault: Fault, training: Training) -> None:
    """Refuse a fault that the model or the number of processes has nothing for."""
    module, world_size = training.module, training.trainer.world_size
    if fault.rank is not None and fault.rank >= world_size:
        raise MisconfigurationException(
            f"`rank` must be < {world_size}, the number of processes, got rank={fault.rank} in {fault!r}"
        )
    all_names = {
        "activation": [name for name, _ in named_modules(module) if name],
        "buffer": [name for name, _ in training.named_buffers],
        "gradient": [name for name, parameter in training.named_parameters if parameter.requires_grad],
        "weight": [name for name, _ in training.named_parameters],
    }
    names = all_names.get(fault.target)
    if names is not None and not any(map(fault.fits, names)):
        few = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise MisconfigurationException(f"{fault!r} fits nothing in the model; there are: {few or 'none'}")
