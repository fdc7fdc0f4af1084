"""The tensors of a step that a fault may hit: those that an optimizer keeps, and the gradients of a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stability_callbacks._nesting import named_tensors

__all__ = ["GradientMarks", "named_optimizer_state"]


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
        for key, value in optimizer.state.get(parameter, {}).items():
            if key != "step":
                yield from named_tensors(value, f"{name}.{key}")


class GradientMarks:
    """Remembers the gradients before a backward pass, to tell afterwards which ones it wrote.

    In manual optimization other optimizers' gradients may still lie there, soon to be zeroed: a fault put into one of
    them would be lost.

    Args:
        parameters: Parameters with their names.

    Example:
        >>> import torch
        >>> used, unused = (torch.ones(1, requires_grad=True) for _ in range(2))
        >>> unused.grad = torch.zeros(1)
        >>> marks = GradientMarks([("used", used), ("unused", unused)])
        >>> used.sum().backward()
        >>> marks.fresh()
        [('used', tensor([1.]))]
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        self._marks = [
            (name, parameter, parameter.grad, 0 if parameter.grad is None else parameter.grad._version)
            for name, parameter in parameters
        ]

    def fresh(self) -> list[tuple[str, Tensor]]:
        """The gradients written since, with their parameters' names."""
        return [
            (name, parameter.grad)
            for name, parameter, before, version in self._marks
            if parameter.grad is not None and _was_written(parameter.grad, before, version)
        ]


def _was_written(gradient: Tensor, before: Tensor | None, version: int) -> bool:
    # Writes to the local shard of a DTensor leave no trace.
    return gradient is not before or gradient._version != version or isinstance(gradient, DTensor)
