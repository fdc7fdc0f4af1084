"""What is asked of every optimizer, whoever wrote it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["is_of_torch", "parameters_of"]


def parameters_of(optimizer: Any) -> list[Tensor]:
    """The parameters of an optimizer, group by group, in its order.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Linear(1, 1).parameters()
        >>> optimizer = torch.optim.SGD([{"params": [bias]}, {"params": [weight]}], lr=0.1)
        >>> [each.dim() for each in parameters_of(optimizer)]
        [1, 2]
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_of_torch(optimizer: Any) -> bool:
    """Whether an optimizer is one of torch's own, of which it is known what they write, and when.

    Example:
        >>> import torch
        >>> is_of_torch(torch.optim.SGD([torch.zeros(1)], lr=0.1))
        True
    """
    return type(optimizer).__module__.startswith("torch.optim.")
