"""The callback that schedules the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from stability_callbacks._validation import check_instance
from stability_callbacks.callbacks._base import StabilityCallback
from stability_callbacks.callbacks._lifecycle import StepLifecycle
from stability_callbacks.callbacks._optimizer_step import OptimizerStep
from stability_callbacks.schedules import Schedule

__all__ = ["LRSchedule"]


class LRSchedule(StabilityCallback):
    r"""Multiplies each optimizer's learning rate by a schedule, such as a warm-up followed by a cosine.

    .. math:: \eta_t = \eta_{\text{base}}(t) \cdot s(t)

    The base rate is whatever the optimizer has, constant or set by a scheduler of your own: the two compose. The very
    first step is scaled already. ``t`` counts the steps that this optimizer attempted, skipped ones included, so that
    the schedule ends where it should. Works in manual optimization and with several parameter groups.

    Without a scheduler of your own, ``LearningRateMonitor`` shows the effective rate; with one it shows the base rate,
    and ``lr/<optimizer>`` the effective rate. Checkpoints always hold the base rate, and it is put back at the end of
    training or after an exception: remove the callback, and no trace is left.

    Where no scheduler is there, ``group["lr"]`` shows the effective rate. To change the rate by hand, set it to the new
    base rate; do not multiply what stands there. A scheduler that you step yourself without telling Lightning, such as
    a ``ReduceLROnPlateau`` in manual optimization, multiplies: return it from ``configure_optimizers``.

    Args:
        schedule: The schedule. Where it needs to know the total number of steps and was not given one, it is the
            trainer's ``estimated_stepping_batches``.

    Raises:
        TypeError: If ``schedule`` is not a schedule.
        MisconfigurationException: At train start, if the schedule needs a total that can't be known.

    Example:
        >>> from stability_callbacks import LRSchedule
        >>> from stability_callbacks.schedules import WarmupCosine
        >>> LRSchedule(WarmupCosine(warmup=100, total_steps=1000)).schedule(50)
        0.5

    Metrics:
        ``lr/<optimizer>``: the effective rate of the step, with ``/pg<n>`` for each of several parameter groups.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = check_instance("schedule", schedule, Schedule, "a schedule, such as WarmupCosine()")  # type: ignore[type-abstract]
        # Lightning asks for the key at every call of every hook.
        self._state_key = self._generate_state_key(schedule=self.schedule)
        self._attempted: list[int] = []
        self._total_steps: int | None = None
        self._rates: dict[str, float | Tensor] = {}

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {"attempted_steps": list(self._attempted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._attempted = list(state_dict["attempted_steps"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._rates = {}
        if stage == "fit" and trainer.global_step == 0:
            self._attempted = []

    def prepare(self, lifecycle: StepLifecycle) -> None:
        optimizers = len(lifecycle.steps)
        if len(self._attempted) != optimizers:
            # A checkpoint without this callback: Lightning's count of steps is that of all optimizers together.
            self._attempted = [lifecycle.trainer.global_step // max(optimizers, 1)] * optimizers
        self._total_steps = _total_steps(lifecycle.trainer, self.schedule, optimizers)
        warmup = getattr(self.schedule, "warmup", None)
        if isinstance(warmup, int) and self._total_steps is not None and warmup > self._total_steps:
            rank_zero_warn(
                f"The warm-up of {warmup} steps is longer than training, which has {self._total_steps}; it is "
                f"shortened to {self.schedule.warmup_steps(self._total_steps)}."
            )

    def rate_multipliers(self, step: OptimizerStep) -> Sequence[float]:
        multiplier = self.schedule(self._attempted[step.index], self._total_steps)
        return [multiplier] * len(step.optimizer.param_groups)

    def before_update(self, step: OptimizerStep) -> None:
        if self.logs_now(step.lifecycle):
            rates = step.rates.effective()
            for index, rate in enumerate(rates, start=1):
                group = f"/pg{index}" if len(rates) > 1 else ""
                self._rates[f"lr/{step.label}{group}"] = rate

    def on_step_attempted(self, step: OptimizerStep) -> None:
        self._attempted[step.index] += 1

    def device_scalars(self) -> list[tuple[Sequence[str], Tensor]]:
        rates = {name: rate for name, rate in self._rates.items() if isinstance(rate, Tensor)}
        return [(list(rates), torch.stack([rate.reshape(()) for rate in rates.values()]))] if rates else []

    def host_scalars(self) -> Mapping[str, float]:
        rates, self._rates = self._rates, {}
        return {name: rate for name, rate in rates.items() if not isinstance(rate, Tensor)}


def _total_steps(trainer: pl.Trainer, schedule: Schedule, optimizers: int) -> int | None:
    """Number of steps that each optimizer will make; None where the schedule can do without it."""
    if schedule.total_steps is not None or not schedule.needs_total:
        return schedule.total_steps
    total = _estimated_steps(trainer)
    if total < 0 or math.isinf(total):
        raise MisconfigurationException(
            f"{schedule!r} needs to know how many steps training has, and the Trainer can't tell (it has no limit, or "
            f"the data set has no length). Say it: {type(schedule).__name__}(total_steps=...) or "
            "Trainer(max_steps=...)."
        )
    if optimizers > 1 and trainer.max_steps > 0:
        # `max_steps` counts the steps of all optimizers.
        total = min(total, math.ceil(trainer.max_steps / optimizers))
    return max(int(total), 1)


def _estimated_steps(trainer: pl.Trainer) -> int | float:
    """The trainer's estimate of its steps, mended where accumulation changes between epochs; < 0 or inf if unknown."""
    total, epochs = trainer.estimated_stepping_batches, trainer.max_epochs or 0
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler) and epochs > 0 and 0 <= total < math.inf:
            windows = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
            total = sum(math.ceil(trainer.num_training_batches / window) for window in windows)
            total = total if trainer.max_steps < 0 else min(total, trainer.max_steps)
    return total
