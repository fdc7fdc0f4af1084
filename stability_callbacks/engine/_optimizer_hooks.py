"""The last moment before an optimizer's arithmetic, and the first one after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from stability_callbacks._optimizers import is_of_torch, parameters_of
from stability_callbacks.engine._lightning import MisconfigurationException

__all__ = ["OptimizerHooks", "obeys_found_inf", "several_closures"]


class OptimizerHooks:
    """Reaches into an optimizer's ``step()``.

    A pre-hook of ``optimizer.step`` fires before the closure, so before forward and backward. It wraps the closure and
    calls ``before`` when that returns; under a loss scaler ``step()`` is called without one, and ``before`` is called
    directly. Hooks that fire twice, as in a subclass that calls ``super().step()``, count once.

    If ``before`` refuses the arithmetic, none of it runs: ``step()`` is left by an exception that never leaves the
    wrapper around the instance's ``step``, and returns what the closure gave. This alone is right for every optimizer.
    Many count steps in ``param_groups`` or in attributes, whether there are gradients or not, and some raise where
    there are none; a subclass or a wrapper such as Lookahead adds work of its own after the inner step. To put all of
    that back one would have to know where it lies. Post-hooks fire all the same, since the step was attempted.

    Optimizers without torch's hooks (no ``Optimizer.__init__``, or no ``Optimizer`` at all) are reached through that
    wrapper only.

    Args:
        optimizer: The optimizer.
        before: Called right before the arithmetic; whether it may run.
        after: Called right after it, or in its place.
        failed: Called when an exception ends the step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[], bool],
        after: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._before = before
        self._after = after
        self._failed = failed
        self._depth = 0
        self._in_step = False
        self._attached = True
        self._owns_found_inf = False
        self._early_writes = _EarlyWrites(optimizer)
        self._own_step = vars(optimizer).get("step")  # a learning rate scheduler leaves one there
        has_hooks = getattr(optimizer.step, "hooked", False) and hasattr(optimizer, "_optimizer_step_pre_hooks")
        self._has_hooks = bool(has_hooks)
        self._step = self._wrap(optimizer.step)
        optimizer.step = self._step  # type: ignore[method-assign]
        self._handles = (
            [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            if self._has_hooks
            else []
        )

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
        self._attached = False
        for handle in self._handles:
            handle.remove()
        attributes = vars(self._optimizer)
        if attributes.get("step") is not self._step:
            return  # somebody has wrapped our wrapper, which does nothing from now on
        if self._own_step is None:
            del attributes["step"]
        else:
            attributes["step"] = self._own_step

    def _wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(getattr(step, "__func__", step))
        def wrapped(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self._attached or self._in_step:
                return step(*args, **kwargs)
            self._depth = 0
            self._in_step = True
            try:
                if not self._has_hooks:
                    changed = self._before_step(optimizer, (optimizer, *args), kwargs)
                    if changed is not None:
                        (_, *args), kwargs = changed  # type: ignore[assignment]
                result = step(*args, **kwargs)
                if not self._has_hooks:
                    self._after()
            except _LeftOut as left_out:
                self._early_writes.undo()
                result = left_out.loss
                self._depth = 1
                for hook in self._post_hooks():
                    hook(optimizer, (optimizer, *args), kwargs)
            except BaseException:
                self._failed()
                raise
            finally:
                self._in_step = False
                self._early_writes.forget()
            return result

        return MethodType(wrapped, self._optimizer)  # schedulers look for the function behind the method

    def _post_hooks(self) -> Iterator[Callable[..., None]]:
        if not self._has_hooks:
            return iter([self._after_step])
        hooks: Mapping[int, Any] = self._optimizer._optimizer_step_post_hooks
        return chain(list(hooks.values()), list(torch_optimizer._global_optimizer_post_hooks.values()))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if isinstance(closure, _ActingClosure):  # a subclass hands our closure on to `super().step(closure)`
            self._depth += 1
            return None
        if closure is None:
            self._depth += 1
            self._act(None)
            return None
        self._depth = 1
        self._early_writes.look()
        acting = _ActingClosure(closure, self._early_writes.compare, self._act, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": acting}
        return (args[0], acting, *args[2:]), kwargs

    def _act(self, loss: Any) -> None:
        # Who calls the class's `step` past the instance's is not in our wrapper; without gradients most do nothing.
        if not self._before() and self._in_step:
            raise _LeftOut(loss)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self._after()


class _LeftOut(BaseException):
    """Leaves an optimizer's ``step()`` before its arithmetic; no error, so that no ``except Exception`` stops it.

    Args:
        loss: What the closure gave.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


class _ActingClosure:
    """An optimizer's closure that acts on the step once forward and backward are through."""

    def __init__(
        self,
        closure: Callable[[], Any],
        begin: Callable[[], None],
        act: Callable[[Any], None],
        optimizer: Optimizer,
    ) -> None:
        self._closure = closure
        self._begin = begin
        self._act = act
        self._optimizer = optimizer
        self._called = False

    def __call__(self) -> Any:
        if self._called:
            raise several_closures(self._optimizer)
        self._called = True
        self._begin()
        result = self._closure()
        self._act(result)
        return result


class _EarlyWrites:
    """Undoes what an optimizer writes to its parameters before it calls the closure.

    Schedule-free optimizers "with closure" move the weights to where the gradient is wanted first. Whether an optimizer
    does is seen in its first step; of those that do, the parameters are backed up before each step. Torch's own do not.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._writes: bool | None = False if is_of_torch(optimizer) else None
        self._backup: list[tuple[Tensor, Tensor, int]] = []

    @torch.no_grad()
    def look(self) -> None:
        """The step begins."""
        if self._writes is not False:
            parameters = parameters_of(self._optimizer)
            self._backup = [(each, each.detach().clone(), each._version) for each in parameters]

    def compare(self) -> None:
        """The closure is called."""
        if self._writes is None and self._backup:
            self._writes = any(parameter._version != version for parameter, _, version in self._backup)
            if not self._writes:
                self._backup = []

    @torch.no_grad()
    def undo(self) -> None:
        """The arithmetic is left out."""
        for parameter, values, _ in self._backup:
            parameter.copy_(values)

    def forget(self) -> None:
        """The step is over."""
        self._backup = []


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
