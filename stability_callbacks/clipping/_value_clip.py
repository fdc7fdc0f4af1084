"""Clipping element by element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stability_callbacks._validation import check_number
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import (
    GradientNorms,
    Parameters,
    add_partial_sums,
    group_by_device_and_dtype,
    measure_gradients,
    named_gradients,
    writable_values,
)

__all__ = ["ValueClip"]


class ValueClip(ClipRule):
    r"""Clamp each gradient element to ``[-max_value, max_value]``.

    Changes the gradient's direction. Use it where single elements explode while the rest is healthy.

    .. math:: g_i \leftarrow \min(\max(g_i, -v), v)

    Equal to :func:`torch.nn.utils.clip_grad_value_` on finite gradients; an infinity is not turned into ``max_value``
    but left for a detector to find. Complex gradients are clamped in their real and imaginary parts. Costs one more
    measurement of the norm, since what clamping leaves of it can't be derived.

    Args:
        max_value: Largest magnitude of an element, > 0.

    Raises:
        TypeError: If ``max_value`` is not a number.
        ValueError: If ``max_value`` is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([-3.0, 0.1])
        >>> _ = ValueClip(max_value=0.5).clip_([weight])
        >>> weight.grad
        tensor([-0.5000,  0.1000])
    """

    def __init__(self, max_value: float) -> None:
        self.max_value = check_number("max_value", max_value, above=0)

    def __repr__(self) -> str:
        return f"ValueClip(max_value={self.max_value:g})"

    @property
    def threshold(self) -> float:
        return self.max_value

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norms = self.measure(pairs, norms)
        finite = norms.finite
        values = [writable_values(_summed_gradient(parameter)) for _, parameter in pairs]
        for (device, dtype), members in group_by_device_and_dtype(values).items():
            group = [values[index] for index in members]
            bound = torch.full((), self.max_value, dtype=dtype, device=device)
            # An infinite bound turns the clamp into the identity, without asking the host whether to clamp.
            bound = torch.where(finite.to(device), bound, math.inf)
            torch._foreach_minimum_(group, [bound] * len(group))
            torch._foreach_maximum_(group, [-bound] * len(group))
        return ClipResult.between(norms.total, measure_gradients(pairs, self.norm_type).total)


def _summed_gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient; one kept as terms of sums is summed first, since it is the sums that are clamped."""
    assert parameter.grad is not None
    parameter.grad = add_partial_sums(parameter.grad)
    if parameter.grad.layout == torch.sparse_coo:
        parameter.grad = parameter.grad.coalesce()
    return parameter.grad
