"""How much state an optimizer will keep, before it keeps any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, optim
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stability_callbacks.snapshots._memory import memory_of

__all__ = ["missing_state_bytes"]

# State tensors of a parameter's own size, by the options of its group.
_TENSORS_PER_PARAMETER: dict[type[Optimizer], Callable[[dict[str, Any]], int]] = {
    optim.SGD: lambda group: int(group["momentum"] != 0),
    optim.Adam: lambda group: 3 if group["amsgrad"] else 2,
    optim.AdamW: lambda group: 3 if group["amsgrad"] else 2,
    optim.RMSprop: lambda group: 1 + int(group["momentum"] > 0) + int(group["centered"]),
    optim.Adagrad: lambda group: 1,
    optim.ASGD: lambda group: 1,
}
if hasattr(optim, "Muon"):  # torch 2.9
    _TENSORS_PER_PARAMETER[optim.Muon] = lambda group: 1
_OF_MOST_OPTIMIZERS = 2


def missing_state_bytes(optimizer: Optimizer) -> int:
    """Estimate the bytes of optimizer state that does not exist yet.

    Optimizers make it at their first step. Counted is what is as large as the parameter, or a factor of it; of an
    optimizer that is none of torch's, two tensors for each parameter, as Adam has them.

    Args:
        optimizer: The optimizer.

    Returns:
        Bytes, in this process, for all parameters that require a gradient and have no state.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(10, 10))
        >>> missing_state_bytes(torch.optim.AdamW([weight]))
        800
    """
    return sum(
        _state_elements(optimizer, group, parameter) * parameter.element_size()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not is_lazy(parameter) and not optimizer.state.get(parameter)
    )


def _state_elements(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> int:
    own = memory_of(parameter).numel()
    if isinstance(optimizer, optim.Adafactor) and parameter.dim() > 1 and own:
        return own // parameter.shape[-1] + own // parameter.shape[-2]  # the mean of each row, and of each column
    if isinstance(optimizer, optim.Adafactor):
        return own
    for kind, count in _TENSORS_PER_PARAMETER.items():
        if isinstance(optimizer, kind):
            return own * count(group)
    return own * _OF_MOST_OPTIMIZERS
