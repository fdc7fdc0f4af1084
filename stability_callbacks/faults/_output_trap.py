"""A trap at the outputs of modules, which corrupts the next one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from stability_callbacks._names import plain_name
from stability_callbacks.activations import ModuleCall, OutputHooks
from stability_callbacks.faults._fault import Fault, draw
from stability_callbacks.snapshots._memory import is_float

__all__ = ["OutputTrap"]


class OutputTrap:
    """Corrupts the output of a module that is drawn, once, by forward hooks that live until then.

    A module may not be called in a step, such as the output projection in ``nn.MultiheadAttention``. So the output of
    the first module to be called is corrupted among the one that was drawn and those that come after it in the model.
    The output is replaced, not written to, and its gradient passes through the fault.

    Args:
        fault: The fault.
        step: The step.
        modules: The modules of a model with their names, as ``named_modules`` gives them. The segments that wrappers
            such as ``torch.compile`` add to names don't count.
        on_hit: Called with the module's name when an output is corrupted.
        armed: Whether to corrupt it; else ``on_hit`` is called all the same. Default True.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> trap = OutputTrap(Fault("activation", steps=0, where="1"), 0, model.named_modules(), print)
        >>> int(model(torch.ones(1, 2)).isnan().sum())
        1
        1
        >>> int(model(torch.ones(1, 2)).isnan().sum())
        0
    """

    def __init__(
        self,
        fault: Fault,
        step: int,
        modules: Iterable[tuple[str, nn.Module]],
        on_hit: Callable[[str], None],
        armed: bool = True,
    ) -> None:
        self._fault = fault
        self._stream = fault.stream(step, "where")
        self._on_hit = on_hit
        self._armed = armed
        candidates = _candidates(fault, modules)
        first = draw(self._stream, range(len(candidates))) if candidates else 0
        self._hooks = OutputHooks(candidates[first:], self._spring, prepend=True)

    def remove(self) -> None:
        """Take the hooks away."""
        self._hooks.remove()

    def _spring(self, call: ModuleCall) -> Any:
        # Of containers that torch's pytree does not know none can be made anew around the corrupted tensor.
        tensors = [leaf for leaf in tree_leaves(call.output) if _can_be_corrupted(leaf)]
        if not tensors or not self._hooks:
            return None
        self.remove()
        self._on_hit(call.name)
        chosen = draw(self._stream, tensors)
        corrupted = self._corrupt(chosen)
        return tree_map_only(Tensor, lambda leaf: corrupted if leaf is chosen else leaf, call.output)

    def _corrupt(self, tensor: Tensor) -> Tensor:
        if not self._armed:
            return tensor
        if math.isfinite(self._fault.factor):
            return tensor * self._fault.factor
        hit = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        hit[draw(self._stream, range(tensor.numel()))] = True
        # A sum, so that the gradient goes through that element and the fault spreads in the backward pass too.
        return torch.where(hit.view(tensor.shape), tensor + self._fault.factor, tensor)


def _candidates(fault: Fault, modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules whose output a fault may corrupt: those that its pattern names, or else those that hold no others."""
    return [
        (name, module)
        for name, module in ((plain_name(name), module) for name, module in modules)
        if name and fault.fits(name) and (fault.where is not None or not any(module.children()))
    ]


def _can_be_corrupted(leaf: Any) -> bool:
    plain = isinstance(leaf, Tensor) and leaf.layout == torch.strided and not isinstance(leaf, DTensor)
    return plain and is_float(leaf) and leaf.numel() > 0
