"""Hooks on the outputs of modules, which come and go together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stability_callbacks._nesting import named_tensors

__all__ = ["ModuleCall", "OutputHooks", "eager", "floating_tensors"]


class ModuleCall(NamedTuple):
    """A call of a module that has just returned.

    Attributes:
        name: The name that the module was given.
        module: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned, of any nesting.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class OutputHooks:
    """Calls a function at each output of some modules, until they are removed.

    Use it as a context, so that an exception leaves no hook behind; or keep it, and call :meth:`remove`. A module that
    is given twice, as one shared under two names is, gets one hook, under the first. Modules that are never called
    never show up; those called several times do so each time. Code that ``torch.compile`` has compiled already calls no
    hooks on what is inside of it: see :func:`eager`.

    Args:
        modules: Names and modules, such as :func:`named_modules` gives.
        observe: Called with each :class:`ModuleCall`. What it returns, unless None, takes the output's place.
        prepend: Whether to come before the hooks that are there. Default False.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with OutputHooks(model.named_children(), lambda call: print(call.name, tuple(call.output.shape))):
        ...     _ = model(torch.zeros(4, 2))
        0 (4, 3)
        1 (4, 3)
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        observe: Callable[[ModuleCall], Any],
        *,
        prepend: bool = False,
    ) -> None:
        self._handles: list[RemovableHandle] = []
        names: dict[nn.Module, str] = {}
        for name, module in modules:
            names.setdefault(module, name)
        try:
            for module, name in names.items():
                hook = _hook(name, observe)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=prepend))
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> OutputHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __bool__(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks away, also while one of them runs."""
        while self._handles:
            self._handles.pop().remove()


def _hook(name: str, observe: Callable[[ModuleCall], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return observe(ModuleCall(name, module, args, kwargs, output))

    return hook


def floating_tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output, or arguments, of any nesting.

    Example:
        >>> [tuple(each.shape) for each in floating_tensors((torch.zeros(2), {"index": torch.tensor([1])}))]
        [(2,)]
    """
    return [tensor for _, tensor in named_tensors(values, "") if tensor.is_floating_point()]


def eager() -> AbstractContextManager[Any]:
    """Run what is compiled as it is written, so that hooks inside of it are called."""
    # Where nothing was compiled, don't import the compiler, which takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
