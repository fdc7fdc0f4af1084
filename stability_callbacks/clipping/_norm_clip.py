"""Clipping by the total norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks._validation import check_number
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import GradientNorms, Parameters, named_gradients, scale_gradients_
from stability_callbacks.schedules import Schedule

__all__ = ["NormClip", "norm_clip_coefficient"]


def norm_clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    r"""The factor that brings a gradient of a given norm down to ``max_norm``; 1 if the norm is not finite.

    .. math:: c = \min\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert + 10^{-6}}\Big)

    Args:
        norm: Total norm, 0-dim.
        max_norm: Largest norm allowed.

    Returns:
        0-dim, in ``(0, 1]``.

    Example:
        >>> norm_clip_coefficient(torch.tensor(float("nan")), 1.0)
        tensor(1.)
    """
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return torch.where(torch.isfinite(norm), coefficient, torch.ones_like(coefficient))


class NormClip(ClipRule):
    r"""Scale all gradients by one factor so that their total norm stays within a bound: the standard remedy.

    Keeps the gradient's direction. Use it against exploding gradients everywhere, and always for recurrent networks.

    .. math:: g \leftarrow g \cdot \min\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\Big)

    Equal to :func:`torch.nn.utils.clip_grad_norm_` on finite gradients, to the bit in float32 and float64; in half
    precision the norm is more exact. Unlike there, a NaN or an infinity does not spread to all gradients: they stay
    untouched.

    The bound may follow a schedule. Inside ``GradientClipping`` its step is the number of steps that the optimizer
    attempted, skipped ones included; elsewhere the rule counts calls of :meth:`clip_`, unless told by :meth:`set_step`.

    Args:
        max_norm: Largest total norm, > 0; or a :class:`~stability_callbacks.schedules.Schedule` whose values are that,
            all > 0: mind its ``start`` and ``end``. :class:`~stability_callbacks.schedules.Scaled` gives it another
            peak than 1. Default 1.0.
        norm_type: The ``p`` of the norm: a positive number or ``inf``. Default 2.

    Raises:
        TypeError: If ``max_norm`` is neither a number nor a schedule, or ``norm_type`` not a number.
        ValueError: If an argument is not positive; in :meth:`set_step` or :meth:`clip_`, if the schedule falls to 0, or
            needs a total that is not known.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> _ = NormClip(max_norm=1.0).clip_([weight])
        >>> weight.grad
        tensor([0.6000, 0.8000])

        From 4 down to 1 in the course of 300 steps:

        >>> from stability_callbacks.schedules import Scaled, WarmupLinear
        >>> rule = NormClip(Scaled(WarmupLinear(warmup=0, end=0.25, total_steps=300), factor=4.0))
        >>> rule.set_step(150)
        >>> _ = rule.clip_([weight])
        >>> rule.threshold
        2.5

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (2013), arXiv 1211.5063.
    """

    linear: ClassVar[bool] = True

    def __init__(self, max_norm: float | Schedule = 1.0, norm_type: float = 2.0) -> None:
        self.max_norm: float | Schedule = (
            max_norm if isinstance(max_norm, Schedule) else check_number("max_norm", max_norm, above=0)
        )
        self.norm_type = check_number("norm_type", norm_type, above=0, allow_inf=True)
        self._step = 0
        self._total_steps: int | None = None
        self._threshold: float | None = None
        self._check_ends()

    def __repr__(self) -> str:
        max_norm = self.max_norm if isinstance(self.max_norm, Schedule) else f"{self.max_norm:g}"
        return f"NormClip(max_norm={max_norm}, norm_type={self.norm_type:g})"

    @property
    def threshold(self) -> float | None:
        """The threshold; where it follows a schedule that of the last step, None before the first."""
        return self._threshold if isinstance(self.max_norm, Schedule) else self.max_norm

    @property
    def schedules(self) -> Sequence[Schedule]:
        return [self.max_norm] if isinstance(self.max_norm, Schedule) else []

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        self._step = step
        if total_steps != self._total_steps:
            self._total_steps = total_steps
            self._check_ends()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step} if isinstance(self.max_norm, Schedule) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict.get("step", 0)

    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norms = self.measure(pairs, norms)
        max_norm = self.max_norm
        if isinstance(max_norm, Schedule):
            max_norm = self._threshold = self._scheduled(max_norm, self._step)
            self._step += 1
        coefficient = norm_clip_coefficient(norms.total, max_norm)
        scale_gradients_(pairs, coefficient)
        return ClipResult(norms.total, norms.total * coefficient, coefficient)

    def _scheduled(self, schedule: Schedule, step: int) -> float:
        value = schedule(step, self._total_steps if schedule.needs_total else schedule.total_steps)
        if not 0 < value < math.inf:
            raise ValueError(
                f"`max_norm` must be a schedule whose values are numbers > 0, got {schedule!r}, which is {value:g} at "
                f"step {step}"
            )
        return value

    def _check_ends(self) -> None:
        """A schedule that starts or ends at 0 must not show it in the middle of training."""
        for schedule in self.schedules:
            total = self._total_steps if schedule.needs_total else schedule.total_steps
            if total is not None or not schedule.needs_total:
                self._scheduled(schedule, 0)
                self._scheduled(schedule, total or 0)
