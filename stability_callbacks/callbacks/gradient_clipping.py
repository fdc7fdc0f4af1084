"""The callback that clips gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stability_callbacks._validation import check_instance
from stability_callbacks.clipping import ClipResult, ClipRule
from stability_callbacks.engine import (
    STATE_VERSION,
    OptimizerStep,
    Phase,
    StabilityCallback,
    StepClock,
    StepRecord,
    Training,
    load_in_place,
)
from stability_callbacks.engine._lightning import MisconfigurationException

__all__ = ["GradientClipping"]


class GradientClipping(StabilityCallback):
    """Clips the gradients by a rule, or by several in order, right before each optimizer step.

    Works in automatic and manual optimization, in every precision (fp16 with a fused optimizer too, which
    ``Trainer(gradient_clip_val=...)`` refuses), and on sharded gradients. The norm comes from the measurement that all
    callbacks share. A non-finite norm leaves the gradients untouched, for a :class:`StepGuard` to act on, and is
    counted. Every optimizer gets its own copy of the rule. A threshold that follows a schedule goes by the number of
    steps that the optimizer attempted, skipped ones included, and by the trainer's ``estimated_stepping_batches``.

    Args:
        rule: A clip rule, or a non-empty list of rules applied in order.

    Raises:
        TypeError: If ``rule`` is neither a rule nor a list of rules.
        ValueError: If the list is empty.
        MisconfigurationException: At train start, if a rule that goes by name does not fit the model's parameters, or
            a schedule falls to 0 or needs a total that can't be known.

    Example:
        >>> from stability_callbacks import GradientClipping
        >>> from stability_callbacks.clipping import NormClip
        >>> GradientClipping(NormClip(max_norm=1.0)).rules
        [NormClip(max_norm=1, norm_type=2)]

    Metrics:
        ``stability/clip_coefficient``: the factor by which the norm was scaled in this step;
        ``stability/clip_threshold``: the threshold, where the rule has one (of the last rule that has);
        ``stability/clipped_fraction``: share of steps clipped since the last log;
        ``stability/nonfinite_norms``: steps so far whose norm was not finite. With several optimizers the first three
        end in the optimizer's name.
    """

    phase = Phase.CLIP

    _clock: StepClock
    _nonfinite_norms: int
    _rules_of_optimizer: list[list[ClipRule]]
    _clipped_steps: dict[str, tuple[int, int]]
    _scalars: list[tuple[Sequence[str], Tensor]]

    def __init__(self, rule: ClipRule | list[ClipRule]) -> None:
        super().__init__()
        self.rules = _check_rules(rule)
        # Lightning asks for the key at every call of every hook.
        self._state_key = self._generate_state_key(rules=self.rules)
        self._reset()

    @property
    def nonfinite_norms(self) -> int:
        """Number of steps so far whose gradient norm was not finite."""
        self._catch_up(everywhere=False)
        return self._nonfinite_norms

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {
            "version": STATE_VERSION,
            "attempted_steps": list(self._clock.attempted),
            "nonfinite_norms": self._nonfinite_norms,
            "clipped_steps": dict(self._clipped_steps),
            "rules": [[rule.state_dict() for rule in rules] for rules in self._rules_of_optimizer],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.attempted = list(state_dict.get("attempted_steps", ()))
        self._nonfinite_norms = state_dict.get("nonfinite_norms", 0)
        self._clipped_steps = dict(state_dict.get("clipped_steps", {}))
        load_in_place(self._rules_of_optimizer, state_dict.get("rules", ()), lambda: deepcopy(self.rules))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._scalars = []
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def prepare(self, training: Training) -> None:
        trainer = training.trainer
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"Gradients are clipped twice: by Trainer(gradient_clip_val={trainer.gradient_clip_val}) and then by "
                f"GradientClipping({self.rules}). Remove one of them."
            )
        self._clock.prepare(training, [schedule for rule in self.rules for schedule in rule.schedules])
        self._assign(training)

    def on_optimizers_changed(self, training: Training) -> None:
        self._clock.make_room(training)
        self._assign(training)

    def statistics(self) -> list[ClipRule]:
        return list(itertools.chain.from_iterable(self._rules_of_optimizer))

    def norm_types(self) -> list[float]:
        return [self.rules[0].norm_type]

    def clip(self, step: OptimizerStep) -> None:
        assert step.gradients is not None
        rules = self._rules_of_optimizer[step.index]
        for rule in rules:
            rule.set_step(self._clock.attempted[step.index], self._clock.total_steps)
            if not rule.linear:
                step.drop_loss_scale()
            norms = step.mask_if_skipped(step.current_norms(rule.norm_type))
            result = rule.clip_(step.gradients.parameters, norms)
            before = step.clip_result
            step.clip_result = (
                result
                if before is None
                else ClipResult(before.norm, result.clipped_norm, before.coefficient * result.coefficient)
            )
        if self.logs_now(self.training) and step.clip_result is not None:
            self._keep_scalars(step, rules, step.clip_result.coefficient)

    def on_step_attempted(self, step: OptimizerStep) -> None:
        self._clock.attempted[step.index] += 1

    def on_step_record(self, record: StepRecord) -> None:
        if not math.isfinite(record.norm):
            self._nonfinite_norms += 1
        elif not record.skipped:
            clipped, steps = self._clipped_steps.get(record.optimizer, (0, 0))
            self._clipped_steps[record.optimizer] = (clipped + (record.coefficient < 1), steps + 1)

    def device_scalars(self) -> list[tuple[Sequence[str], Tensor]]:
        scalars, self._scalars = self._scalars, []
        return scalars

    def host_scalars(self) -> Mapping[str, float]:
        metrics = {"stability/nonfinite_norms": float(self._nonfinite_norms)}
        several = len(self._rules_of_optimizer) > 1
        for optimizer, (clipped, steps) in self._clipped_steps.items():
            metrics["stability/clipped_fraction" + (f"/{optimizer}" if several else "")] = clipped / steps
        self._clipped_steps = {}
        return metrics

    def _assign(self, training: Training) -> None:
        missing = len(training.steps) - len(self._rules_of_optimizer)
        self._rules_of_optimizer += [deepcopy(self.rules) for _ in range(missing)]
        parameters = _in_order_of_definition(training)
        try:
            for rule in itertools.chain.from_iterable(self._rules_of_optimizer):
                rule.assign(parameters)
                rule.set_step(0, self._clock.total_steps)
        except ValueError as error:
            raise MisconfigurationException(
                f"GradientClipping's rule does not fit the model or its training: {error}"
            ) from error

    def _keep_scalars(self, step: OptimizerStep, rules: list[ClipRule], coefficient: Tensor) -> None:
        names, values = [f"stability/clip_coefficient{step.suffix}"], [coefficient]
        thresholds = [rule.threshold for rule in rules if rule.threshold is not None]
        if thresholds:
            names.append(f"stability/clip_threshold{step.suffix}")
            values.append(torch.as_tensor(thresholds[-1], dtype=coefficient.dtype, device=coefficient.device))
        self._scalars.append((names, torch.stack(values)))

    def _reset(self) -> None:
        self._clock = StepClock()
        self._nonfinite_norms = 0
        self._rules_of_optimizer = []
        self._clipped_steps = {}
        self._scalars = []


def _in_order_of_definition(training: Training) -> list[tuple[str, Tensor]]:
    """The parameters of all optimizers; those that the model does not know come last."""
    place = {id(parameter): index for index, (_, parameter) in enumerate(training.named_parameters)}
    pairs = itertools.chain.from_iterable(step.parameters for step in training.steps.values())
    return sorted(pairs, key=lambda pair: place.get(id(pair[1]), len(place)))


def _check_rules(rule: ClipRule | list[ClipRule]) -> list[ClipRule]:
    allowed = "a clip rule, such as NormClip(1.0), or a non-empty list of rules"
    if not isinstance(rule, (list, tuple)):
        return [check_instance("rule", rule, ClipRule, allowed)]  # type: ignore[type-abstract]
    if not rule:
        raise ValueError(f"`rule` must be {allowed}, got {rule!r}")
    return [check_instance(f"rule[{i}]", item, ClipRule, "a clip rule") for i, item in enumerate(rule)]  # type: ignore[type-abstract]
