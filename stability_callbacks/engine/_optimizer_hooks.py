"""The last moment before an optimizer's arithmetic, and the first one after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from stability_callbacks.engine._lightning import MisconfigurationException

__all__ = ["OptimizerHooks", "obeys_found_inf", "several_closures"]


class OptimizerHooks:
    """Reaches into an optimizer's ``step()``.

    A pre-hook of ``optimizer.step`` fires before the closure, so before forward and backward. It wraps the closure and
    calls ``before`` when that returns; under a loss scaler ``step()`` is called without one, and ``before`` is called
    directly. Hooks that fire twice, as in a subclass that calls ``super().step()``, count once.

    Args:
        optimizer: The optimizer.
        before: Called right before the arithmetic.
        after: Called right after it.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._before = before
        self._after = after
        self._depth = 0
        self._owns_found_inf = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def skip_where(self, skip: Tensor) -> None:
        """Let fused kernels leave everything as it is where ``skip``, 0-dim, is true."""
        found_inf = skip.to(torch.float32)  # the kernels take exactly 1.0 for that
        of_scaler = getattr(self._optimizer, "found_inf", None)
        if of_scaler is not None:
            found_inf = torch.maximum(found_inf, of_scaler.to(found_inf.device).clamp(max=1.0))
        self._owns_found_inf = of_scaler is None
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def undo(self) -> None:
        """Take back what :meth:`skip_where` did."""
        if self._owns_found_inf:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            self._owns_found_inf = False

    def remove(self) -> None:
        """Let go of the optimizer."""
        self.undo()
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if isinstance(closure, _ActingClosure):  # a subclass hands our closure on to `super().step(closure)`
            self._depth += 1
            return None
        if closure is None:
            self._depth += 1
            self._before()
            return None
        self._depth = 1
        acting = _ActingClosure(closure, self._before, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": acting}
        return (args[0], acting, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self._after()


class _ActingClosure:
    """An optimizer's closure that acts on the step once forward and backward are through."""

    def __init__(self, closure: Callable[[], Any], act: Callable[[], None], optimizer: Optimizer) -> None:
        self._closure = closure
        self._act = act
        self._optimizer = optimizer
        self._called = False

    def __call__(self) -> Any:
        if self._called:
            raise several_closures(self._optimizer)
        self._called = True
        result = self._closure()
        self._act()
        return result


def several_closures(optimizer: Optimizer) -> MisconfigurationException:
    """The error about an optimizer that evaluates its closure more than once in a step."""
    return MisconfigurationException(
        f"The stability callbacks do not work with {type(optimizer).__name__}: it evaluates the loss several times in "
        "a step, so there is no one set of gradients to judge. Use a first-order optimizer, or remove the callbacks."
    )


def obeys_found_inf(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves everything as it is where ``found_inf`` is 1, so that the host need not know.

    True of torch's fused kernels once their state exists: fused SGD leaves a new momentum buffer uninitialized.
    """
    if type(optimizer) not in (SGD, Adagrad, Adam, AdamW) or not all(g.get("fused") for g in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        needs_state = type(optimizer) is not SGD or group["momentum"] != 0
        for parameter in group["params"]:
            if parameter.grad is not None and (
                isinstance(parameter, DTensor) or (needs_state and not optimizer.state.get(parameter))
            ):
                return False
    return True
