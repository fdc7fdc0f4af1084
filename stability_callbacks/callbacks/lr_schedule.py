"""The callback that schedules the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stability_callbacks._patterns import check_patterns, first_matches
from stability_callbacks.engine import OptimizerStep, Phase, StabilityCallback, StepClock, Training
from stability_callbacks.engine._lightning import MisconfigurationException
from stability_callbacks.schedules import Schedule

__all__ = ["LRSchedule"]


class LRSchedule(StabilityCallback):
    r"""Multiplies each optimizer's learning rate by a schedule, such as a warm-up followed by a cosine.

    .. math:: \eta_t = \eta_{\text{base}}(t) \cdot s(t)

    The base rate is whatever the optimizer has, constant or set by a scheduler of your own: the two compose. The very
    first step is scaled already. ``t`` counts the steps that this optimizer attempted, skipped ones included, so that
    the schedule ends where it should. Works in manual optimization and with several parameter groups.

    Optimizers and parameter groups may have schedules of their own, by a mapping from name patterns to schedules. A
    group's full name is that of ``LearningRateMonitor``: the optimizer's class (``Adam-1`` for the second Adam), then
    ``/`` and the group's ``"name"``, or ``/pg1``, ``/pg2``, ... where several have none::

        torch.optim.AdamW([{"name": "backbone", "params": ...}, {"name": "head", "params": ...}])
        LRSchedule({"backbone": WarmupCosine(warmup=0.2), "head": WarmupCosine(warmup=0.05)})

    The effective rate is in force only inside of ``optimizer.step``. Between steps ``group["lr"]`` is the base rate,
    for whoever reads or writes it: schedulers that Lightning knows or does not, callbacks such as
    ``BackboneFinetuning``, your own code, and checkpoints. Remove the callback, and no trace is left. Only
    ``LearningRateMonitor`` is shown the effective rate of the next step, where no scheduler of yours sets the base
    rate; ``lr/<optimizer>`` is always the effective one.

    Args:
        schedule: The schedule; or a mapping from regular expressions, searched in the parameter groups' full names, to
            schedules: the first match wins, None leaves the groups alone. Where a schedule needs to know the total
            number of steps and was not given one, it is the trainer's ``estimated_stepping_batches``.

    Raises:
        TypeError: If ``schedule`` is neither a schedule nor a mapping to schedules.
        ValueError: If the mapping is empty, or a pattern is not a regular expression.
        MisconfigurationException: At train start, if a schedule needs a total that can't be known, if a pattern matches
            no parameter group or a group no pattern, or if an optimizer to be scheduled has no learning rate; for
            groups that are added later, in their first step.

    Example:
        >>> from stability_callbacks import LRSchedule
        >>> from stability_callbacks.schedules import WarmupCosine
        >>> LRSchedule(WarmupCosine(warmup=100, total_steps=1000)).schedule(50)
        0.5

    Metrics:
        ``lr/<optimizer>``: the effective rate of the step, with ``/pg<n>`` for each of several parameter groups.
    """

    phase = Phase.SCHEDULE

    def __init__(self, schedule: Schedule | Mapping[str, Schedule | None]) -> None:
        super().__init__()
        allowed = (
            'a schedule, such as WarmupCosine(), or a mapping of name patterns to schedules, such as {"head": ...}'
        )
        self.schedule: Schedule | dict[str, Schedule | None] = (
            schedule
            if isinstance(schedule, Schedule)
            else check_patterns("schedule", schedule, Schedule, "a schedule", allowed)  # type: ignore[type-abstract]
        )
        # Lightning asks for the key at every call of every hook.
        self._state_key = self._generate_state_key(schedule=self.schedule)
        self._clock = StepClock()
        self._pattern_of: dict[str, str] = {}
        self._rates: dict[str, float | Tensor] = {}

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {"attempted_steps": list(self._clock.attempted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.attempted = list(state_dict.get("attempted_steps", ()))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._rates = {}
        if stage == "fit" and trainer.global_step == 0:
            self._clock = StepClock()

    def prepare(self, training: Training) -> None:
        self._clock.prepare(training, list(self._schedules()))
        self._look_at_groups(training)
        for schedule in self._schedules():
            warmup, total = getattr(schedule, "warmup", None), self._clock.total_for(schedule)
            if isinstance(warmup, int) and total is not None and warmup > total:
                rank_zero_warn(
                    f"The warm-up of {warmup} steps is longer than training, which has {total}; it is shortened to "
                    f"{schedule.warmup_steps(total)}."
                )

    def on_optimizers_changed(self, training: Training) -> None:
        self._clock.make_room(training)
        self._look_at_groups(training)

    def rate_multipliers(self, step: OptimizerStep) -> Sequence[float]:
        attempted = self._clock.attempted[step.index]
        return [
            1.0 if schedule is None else schedule(attempted, self._clock.total_for(schedule))
            for schedule in self._schedules_of_groups(step)
        ]

    def before_update(self, step: OptimizerStep) -> None:
        if self.logs_now(self.training):
            rates = step.rates.effective()
            for index, rate in enumerate(rates, start=1):
                group = f"/pg{index}" if len(rates) > 1 else ""
                self._rates[f"lr/{step.label}{group}"] = rate

    def on_step_attempted(self, step: OptimizerStep) -> None:
        self._clock.attempted[step.index] += 1

    def device_scalars(self) -> list[tuple[Sequence[str], Tensor]]:
        rates = {name: rate for name, rate in self._rates.items() if isinstance(rate, Tensor)}
        return [(list(rates), torch.stack([rate.reshape(()) for rate in rates.values()]))] if rates else []

    def host_scalars(self) -> Mapping[str, float]:
        rates, self._rates = self._rates, {}
        return {name: rate for name, rate in rates.items() if not isinstance(rate, Tensor)}

    def _schedules(self) -> Iterator[Schedule]:
        several = self.schedule.values() if isinstance(self.schedule, dict) else [self.schedule]
        return (schedule for schedule in several if schedule is not None)

    def _schedules_of_groups(self, step: OptimizerStep) -> list[Schedule | None]:
        if not isinstance(self.schedule, dict):
            return [self.schedule] * len(step.optimizer.param_groups)
        names = _group_names(step)
        if not self._pattern_of.keys() >= set(names):  # a group was added
            self._match([*self._pattern_of, *names])
        return [self.schedule[self._pattern_of[name]] for name in names]

    def _look_at_groups(self, training: Training) -> None:
        if isinstance(self.schedule, dict):
            self._match([name for step in training.steps.values() for name in _group_names(step)])
        for step in training.steps.values():
            if not step.rates.known and any(schedule is not None for schedule in self._schedules_of_groups(step)):
                raise MisconfigurationException(
                    f"LRSchedule has nothing to multiply: {step.label} has no learning rate of its own ('lr' is None "
                    "or absent), as Adafactor with relative steps. Give the optimizer an `lr`, or leave it out by a "
                    f"mapping with None, such as LRSchedule({{'^{step.label}': None, ...}})."
                )

    def _match(self, names: Sequence[str]) -> None:
        assert isinstance(self.schedule, dict)
        try:
            self._pattern_of = first_matches(self.schedule, names, "LRSchedule", "parameter group")
        except ValueError as error:
            raise MisconfigurationException(f"LRSchedule does not fit the optimizers: {error}") from error


def _group_names(step: OptimizerStep) -> list[str]:
    """The full names of an optimizer's parameter groups, as ``LearningRateMonitor`` forms them."""
    groups = step.optimizer.param_groups
    names = [group.get("name", f"pg{index}" if len(groups) > 1 else None) for index, group in enumerate(groups, 1)]
    return [step.label if name is None else f"{step.label}/{name}" for name in names]
