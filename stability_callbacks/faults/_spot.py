"""The place in memory that a fault hits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from stability_callbacks.faults._fault import Fault, draw
from stability_callbacks.gradient_pass import writable_values
from stability_callbacks.snapshots._memory import is_float, memory_of

__all__ = ["Spot", "draw_spot"]


class Spot(NamedTuple):
    """A place in memory that a fault hits.

    Attributes:
        name: The name of the tensor.
        memory: A view of the element that is hit, 0-dim, or of all elements.
    """

    name: str
    memory: Tensor

    @torch.no_grad()
    def corrupt_(self, value: float) -> Callable[[], None]:
        """Put a value that is not finite there, or multiply by one that is.

        Args:
            value: The value, or the factor.

        Returns:
            A function that puts back what was there, bit for bit.
        """
        before = self.memory.clone()
        if math.isfinite(value):
            self.memory.mul_(value)
        else:
            self.memory.fill_(value)

        def undo() -> None:
            self.memory.copy_(before)

        return undo


@torch.no_grad()
def draw_spot(fault: Fault, step: int, candidates: Iterable[tuple[str, Tensor]]) -> Spot | None:
    """Draw the tensor, and the element of it, that a fault hits in a step.

    Args:
        fault: The fault.
        step: The step.
        candidates: Tensors with their names, in an order that is the same in each run. Those that can't hold NaN, are
            empty or have no shape yet are passed over. Of a sparse tensor the stored values count, of a sharded one the
            local shard: each process has its own element, and if its shard is empty, none.

    Returns:
        The place; None if nothing fits the fault.

    Example:
        >>> weight, mask = torch.ones(2, 3), torch.ones(2, dtype=torch.bool)
        >>> spot = draw_spot(Fault("weight", steps=0), 0, [("weight", weight), ("mask", mask)])
        >>> undo = spot.corrupt_(float("nan"))
        >>> int(weight.isnan().sum())
        1
    """
    fitting = [(name, tensor) for name, tensor in candidates if fault.fits(name) and _may_hold_nan(tensor)]
    if not fitting:
        return None
    stream = fault.stream(step, "where")
    name, tensor = draw(stream, fitting)
    memory = memory_of(writable_values(tensor))
    if math.isfinite(fault.factor) or not memory.numel():
        return Spot(name, memory)
    return Spot(name, memory[np.unravel_index(draw(stream, range(memory.numel())), memory.shape)])


def _may_hold_nan(tensor: Tensor) -> bool:
    if is_lazy(tensor) or not is_float(tensor):
        return False
    return bool(tensor.numel() if tensor.layout == torch.strided else writable_values(tensor).numel())
