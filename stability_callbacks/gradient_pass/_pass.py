"""The gradients of one optimizer step, measured once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stability_callbacks._validation import check_number
from stability_callbacks.gradient_pass._names import Parameters, named_gradients
from stability_callbacks.gradient_pass._norms import combine_norms, tensor_norms

__all__ = ["GradientNorms", "GradientPass", "measure_gradients"]


class GradientNorms(NamedTuple):
    """The norms of a set of gradients, on the gradients' device.

    Attributes:
        names: Names of the parameters that have a gradient, in order.
        per_tensor: Norm of each gradient, shape ``[P]``, float32 (float64 if a gradient is).
        total: Norm over all gradients, 0-dim.
        norm_type: The ``p`` of the norm.
    """

    names: tuple[str, ...]
    per_tensor: Tensor
    total: Tensor
    norm_type: float

    @property
    def finite(self) -> Tensor:
        """Whether every gradient is finite, as a 0-dim boolean on the device.

        Derived from the total norm: a NaN or an infinity in any element makes it non-finite. So do elements whose
        ``p``-th power float32 can't hold (for the L2 norm above 1.8e19), which no optimizer survives either.
        """
        return torch.isfinite(self.total)


def measure_gradients(
    parameters: Parameters, norm_type: float = 2.0, inverse_scale: Tensor | None = None
) -> GradientNorms:
    """Measure the gradients of some parameters once: each norm, the total, and whether all are finite.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs; those without a gradient are left out.
        norm_type: The ``p`` of the norm: a positive number or ``inf``.
        inverse_scale: 0-dim factor for the norms of gradients that still carry a loss scale (fp16 with a fused
            optimizer). Exact where the scale is a power of two, as loss scalers have it by default.

    Returns:
        The norms, on the first gradient's device.

    Raises:
        ValueError: If ``norm_type`` is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> measure_gradients([("weight", weight)]).total
        tensor(5.)
    """
    check_number("norm_type", norm_type, above=0, allow_inf=True)
    pairs = named_gradients(parameters)
    per_tensor = tensor_norms([parameter.grad for _, parameter in pairs if parameter.grad is not None], norm_type)
    if inverse_scale is not None:
        per_tensor = per_tensor * inverse_scale.to(per_tensor.device)
    return GradientNorms(
        names=tuple(name for name, _ in pairs),
        per_tensor=per_tensor,
        total=combine_norms(per_tensor, norm_type),
        norm_type=norm_type,
    )


class GradientPass:
    """The gradients of one optimizer step: measured once per norm type, and watched for changes.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs.
        inverse_scale: See :func:`measure_gradients`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = GradientPass([("weight", weight)])
        >>> gradients.norms() is gradients.norms()
        True
        >>> _ = weight.grad.mul_(2)
        >>> gradients.changed()
        True
    """

    def __init__(self, parameters: Parameters, inverse_scale: Tensor | None = None) -> None:
        self.parameters = named_gradients(parameters)
        self.inverse_scale = inverse_scale
        self._seen = [(parameter.grad, _version(parameter.grad)) for _, parameter in self.parameters]
        self._sharded = any(isinstance(gradient, DTensor) for gradient, _ in self._seen)
        self._norms: dict[float, GradientNorms] = {}

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def norms(self, norm_type: float = 2.0) -> GradientNorms:
        """The norms, measured at the first call and kept."""
        if norm_type not in self._norms:
            self._norms[norm_type] = measure_gradients(self.parameters, norm_type, self.inverse_scale)
        return self._norms[norm_type]

    def changed(self) -> bool:
        """Whether any gradient was, or may have been, replaced or written to since the pass was taken.

        A check by the host alone, of version counters. Writes through ``.data`` escape it, as they escape autograd.
        Sharded gradients always may have changed: grouped in-place operations on a ``DTensor``, such as those of
        ``clip_grad_norm_``, leave no trace (torch 2.13). So ranks never disagree on whether to measure them again.
        """
        return self._sharded or any(
            parameter.grad is not gradient or _version(parameter.grad) != version
            for (_, parameter), (gradient, version) in zip(self.parameters, self._seen, strict=True)
        )


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version
