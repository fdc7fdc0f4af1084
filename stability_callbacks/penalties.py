"""Penalties on the size of weights, as gradients and as shrinkage. Pure PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stability_callbacks.gradient_pass import local_values, writable_values

__all__ = ["add_penalty_gradients_", "shrink_", "zero_fraction"]


@torch.no_grad()
def add_penalty_gradients_(parameters: Sequence[Tensor], l1: float = 0.0, l2: float = 0.0) -> None:
    r"""Add the gradient of an L1 and an L2 penalty to the gradients of some parameters.

    .. math:: g \leftarrow g + \lambda_2 w + \lambda_1 \operatorname{sign}(w)

    The L2 part is to the last bit what ``torch.optim.SGD(weight_decay=...)`` adds.

    Args:
        parameters: Parameters; those without a gradient, or with a sparse one, are left out.
        l1: Strength of the L1 penalty.
        l2: Strength of the L2 penalty.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        >>> weight.grad = torch.zeros(2)
        >>> add_penalty_gradients_([weight], l1=0.1, l2=0.5)
        >>> weight.grad
        tensor([ 1.1000, -0.6000])
    """
    dense = [p for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
    gradients = [local_values(p.grad) for p in dense if p.grad is not None]
    weights = [local_values(p.detach()) for p in dense]
    if dense and l2:
        torch._foreach_add_(gradients, weights, alpha=l2)
    if dense and l1:
        torch._foreach_add_(gradients, [torch.sgn(weight) for weight in weights], alpha=l1)


@torch.no_grad()
def shrink_(parameters: Sequence[Tensor], l1: float | Tensor = 0.0, l2: float | Tensor = 0.0) -> None:
    r"""Shrink weights directly, apart from any gradient: the proximal step of the two penalties.

    .. math:: w \leftarrow (1 - \lambda_2) \, w, \qquad
              w \leftarrow \operatorname{sign}(w) \max(|w| - \lambda_1, 0)

    Soft-thresholding makes small weights exactly 0, which the gradient of an L1 penalty never does.

    Args:
        parameters: Parameters.
        l1: How much each weight's magnitude shrinks: the penalty times the learning rate. A number, or 0-dim.
        l2: The share by which each weight shrinks: the penalty times the learning rate. A number, or 0-dim.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.25, -2.0]))
        >>> shrink_([weight], l1=0.5)
        >>> weight
        Parameter containing:
        tensor([ 0.0000, -1.5000], requires_grad=True)
    """
    weights = [writable_values(parameter.detach()) for parameter in parameters]
    for weight in weights:
        if isinstance(l2, Tensor) or l2:
            weight.mul_(1 - l2)
        if isinstance(l1, Tensor) or l1:
            # `copysign` keeps the sign of -0.0 too, so that shrinking by 0 changes no bit.
            weight.copy_(torch.copysign((weight.abs() - l1).clamp_(min=0), weight))


def zero_fraction(parameters: Sequence[Tensor]) -> Tensor:
    """Share of weights that are exactly 0, on the device, of the numbers that this process holds.

    Args:
        parameters: Parameters.

    Returns:
        0-dim, in ``[0, 1]``; 0 for no weights.

    Example:
        >>> zero_fraction([torch.tensor([0.0, 1.0]), torch.zeros(2)])
        tensor(0.7500)
    """
    weights = [local_values(parameter) for parameter in parameters]
    total = sum(weight.numel() for weight in weights)
    if not total:
        return torch.zeros(())
    zeros = [weight.numel() - torch.count_nonzero(weight) for weight in weights]
    return torch.stack([count.to(weights[0].device) for count in zeros]).sum() / total
