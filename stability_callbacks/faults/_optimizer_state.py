"""The tensors that an optimizer keeps, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.optim import Optimizer

from stability_callbacks._nesting import named_tensors

__all__ = ["named_optimizer_state"]


def named_optimizer_state(
    optimizer: Optimizer, parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an optimizer keeps for its parameters, without its counts of steps.

    Args:
        optimizer: The optimizer.
        parameters: Its parameters with their names.

    Yields:
        Name and tensor: ``head.weight.exp_avg``. Nothing before the optimizer's first step.
    """
    for name, parameter in parameters:
        state = optimizer.state.get(parameter, {})
        yield from named_tensors({key: value for key, value in state.items() if key != "step"}, name)
