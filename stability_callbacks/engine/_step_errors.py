"""Exceptions in a training step that bad numbers caused: the step is bad, and training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from stability_callbacks.diagnosis import numeric_fault, raising_line
from stability_callbacks.engine._training import StepError, Training

__all__ = ["StepErrors"]


# Exceptions in a row that count because a tensor nearby holds NaN, and not by what they say: targets may hold NaN on
# purpose, and then a mistake in the code raises in each step.
_MOST_BY_NEIGHBORS = 3


class StepErrors:
    """Stands between a model's ``training_step``, and its backward pass, and the trainer.

    Of an exception that NaN, infinity or numbers out of an operation's domain caused it makes a loss of NaN. That loss
    depends on all trainable parameters, so all processes find the same gradients NaN and skip the step together. Any
    other exception goes on, after it was reported.

    Args:
        training: The run.
        catches: Whether there is somebody to skip the step.
        on_error: Told of an exception that goes on.
        drop_step: Drops the step of a manual optimization, which the exception has cut short.
    """

    def __init__(
        self,
        training: Training,
        catches: bool,
        on_error: Callable[[StepError], None],
        drop_step: Callable[[], None],
    ) -> None:
        self._training = training
        self._catches = catches
        self._on_error = on_error
        self._drop_step = drop_step
        self._by_neighbors = 0
        self._put_back: list[Callable[[], None]] = []
        self._wrap(training.module, "training_step", self._after_step_failed, nearby=True, passed=self._step_passed)
        if not training.processes.several:  # of several, one that breaks off would leave the others waiting
            self._wrap(training.trainer.strategy, "backward", self._after_backward_failed, nearby=False)

    def remove(self) -> None:
        """Give model and strategy their own methods back."""
        while self._put_back:
            self._put_back.pop()()

    def _wrap(self, owner: Any, name: str, recover: Callable[..., Any], nearby: bool, passed: Any = None) -> None:
        attributes = vars(owner)
        before = attributes.get(name)
        attributes[name] = _Guarded(owner, name, partial(self._on_exception, recover, nearby), passed)

        def put_back() -> None:
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before

        self._put_back.append(put_back)

    def _on_exception(self, recover: Callable[..., Any], nearby: bool, error: Exception, *args: Any) -> Any:
        reason, line = numeric_fault(error, nearby and self._by_neighbors < _MOST_BY_NEIGHBORS), raising_line(error)
        source = None if line is None else str(line)
        self._by_neighbors = 0 if reason is None or numeric_fault(error, nearby=False) else self._by_neighbors + 1
        if reason is None or not self._catches or self._training.is_sharded:
            self._on_error(StepError(reason or f"{type(error).__name__}: {error}".splitlines()[0], source))
            raise error
        self._training.errors[self._training.trainer.global_step] = StepError(reason, source)
        return recover(*args)

    def _step_passed(self) -> None:
        self._by_neighbors = 0

    def _after_step_failed(self, *args: Any) -> Tensor | None:
        if self._training.module.automatic_optimization:
            return _nan_loss(self._trained())
        self._drop_step()
        return None

    def _after_backward_failed(self, *args: Any) -> None:
        for parameter in self._trained():
            parameter.grad = torch.full_like(parameter, math.nan)

    def _trained(self) -> list[Tensor]:
        if self._training.processes.several:  # DistributedDataParallel waits for every one that has a gradient
            return [each for each in self._training.module.parameters() if each.requires_grad]
        steps = self._training.steps.values()
        return [parameter for step in steps for _, parameter in step.parameters if parameter.requires_grad]


class _Guarded:
    """A method that hides another one of the same name; copies and pickles of its owner get that one."""

    def __init__(
        self, owner: Any, name: str, on_exception: Callable[..., Any], passed: Callable[[], None] | None = None
    ) -> None:
        self.unguarded = getattr(owner, name)
        self._owner = owner
        self._name = name
        self._on_exception = on_exception
        self._passed = passed
        update_wrapper(self, self.unguarded)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self.unguarded(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # it goes on where it is not caused by numbers
            return self._on_exception(error, *args)
        if self._passed is not None:
            self._passed()
        return result

    def __reduce__(self) -> Any:
        return _bound, (getattr(type(self._owner), self._name), self._owner)


def _bound(function: Callable[..., Any], owner: Any) -> Any:
    return MethodType(function, owner)


def _nan_loss(parameters: list[Tensor]) -> Tensor:
    """A loss of NaN on which each parameter has a gradient, of NaN in its first element."""
    return torch.stack([parameter.flatten()[:1].sum() for parameter in parameters]).sum() * math.nan
