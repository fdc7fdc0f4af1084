"""Which module of a model runs now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from stability_callbacks.activations._modules import named_modules

__all__ = ["ModuleStack"]


class ModuleStack:
    """Which module of a model runs now, under its plain name.

    Args:
        model: The model.

    Example:
        >>> class Show(nn.Module):
        ...     def forward(self, x):
        ...         print(repr(stack.current))
        >>> model = nn.Sequential(nn.Sequential(Show()))
        >>> stack = ModuleStack(model)
        >>> with stack.watching():
        ...     model(None)
        '0.0'
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._running: list[str] = []

    @property
    def current(self) -> str:
        """Full name of the innermost module that runs; empty outside of all submodules."""
        return self._running[-1] if self._running else ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the modules' calls; the hooks for it are gone afterwards, also after an exception."""
        with ExitStack() as hooks:
            for name, module in named_modules(self.model):
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, name: str, *_: Any) -> None:
        while self._running and self._running.pop() != name:
            pass  # a module that an exception left early
