"""Scaling gradients in place by coefficients that lie on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from stability_callbacks.gradient_pass._names import Parameters, named_gradients
from stability_callbacks.gradient_pass._views import group_by_device_and_dtype, writable_values

__all__ = ["scale_each_gradient_", "scale_gradients_"]


@torch.no_grad()
def scale_gradients_(parameters: Parameters, coefficient: Tensor) -> None:
    """Multiply all gradients in place by one coefficient that lies on the device.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs; those without a gradient are left out.
        coefficient: 0-dim. It multiplies in its own precision, so a float32 factor is not rounded to fp16 first.
    """
    values = _writable_gradients(parameters)
    for (device, dtype), members in group_by_device_and_dtype(values).items():
        group = [values[index] for index in members]
        factor = coefficient.to(device)
        if dtype.itemsize < factor.dtype.itemsize:
            torch._foreach_mul_(group, [_unrounded(factor, value) for value in group])
        else:
            torch._foreach_mul_(group, factor)


@torch.no_grad()
def scale_each_gradient_(parameters: Parameters, coefficients: Tensor) -> None:
    """Multiply each gradient in place by its own coefficient; see :func:`scale_gradients_`.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs; those without a gradient are left out.
        coefficients: One for each of the ``P`` gradients, shape ``[P]``.
    """
    values = _writable_gradients(parameters)
    factors = coefficients.unbind()
    for (device, _), members in group_by_device_and_dtype(values).items():
        group_factors = [_unrounded(factors[index].to(device), values[index]) for index in members]
        torch._foreach_mul_([values[index] for index in members], group_factors)


def _writable_gradients(parameters: Parameters) -> list[Tensor]:
    gradients = [parameter.grad for _, parameter in named_gradients(parameters)]
    return [writable_values(gradient) for gradient in gradients if gradient is not None]


def _unrounded(factor: Tensor, value: Tensor) -> Tensor:
    """A 0-dim factor that multiplies in its own precision: off the CPU it needs dimensions for that."""
    return factor if value.device.type == "cpu" else factor.expand_as(value)
