"""Reading a module's own ``forward`` as a graph in which each child is one node."""

from __future__ import annotations

import copy
import inspect
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, Proxy, Tracer
from torch.fx.proxy import TraceError

__all__ = ["preserved_randomness", "shallow_copy", "trace_forward"]

# How often a trace is begun anew to try the other side of a branch, and how long a single one may branch.
_MAX_ATTEMPTS = 16
_MAX_BRANCHES = 64


class _OneLevelTracer(Tracer):
    """Traces one module's own ``forward`` without entering its children."""

    proxy_buffer_attributes = True  # an in-place change of a buffer becomes a node, too

    def __init__(self, branches: list[bool]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.branches = branches
        self.branches_met = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: Proxy) -> bool:
        """Decide what a condition on the input is, where only a real input could tell."""
        if self.branches_met == _MAX_BRANCHES:
            raise TraceError("too many branches that depend on the input")
        if self.branches_met == len(self.branches):
            self.branches.append(False)
        self.branches_met += 1
        return self.branches[self.branches_met - 1]


def trace_forward(module: nn.Module) -> Graph | None:
    """Read a module's own ``forward`` as a graph; its children are single nodes and do not run.

    Nothing happens to the module: a shallow copy of it is traced. Arguments with a default have it. Where ``forward``
    branches on its input, conditions count as false, and as true where that leads to an exception: so checks pass.

    Returns:
        The graph; None where ``forward`` cannot be read so, because it loops over its input, say, or calls code that
        wants real tensors.
    """
    if any(_belongs_to(value, module) for value in vars(module).values()):
        return None  # it would act on the module itself, not on its copy
    branches: list[bool] = []
    with warnings.catch_warnings(), preserved_randomness():
        warnings.simplefilter("ignore")
        for _ in range(_MAX_ATTEMPTS):
            tracer = _OneLevelTracer(branches)
            try:
                return tracer.trace(shallow_copy(module), concrete_args=_defaults(module))
            except Exception:  # noqa: BLE001  # a user's forward may raise anything when it meets a proxy
                if not _take_other_side(branches, tracer.branches_met):
                    return None
    return None


def _defaults(module: nn.Module) -> dict[str, Any]:
    arguments = inspect.signature(type(module).forward).parameters.values()
    return {each.name: each.default for each in arguments if each.default is not each.empty}


def _belongs_to(value: object, module: nn.Module) -> bool:
    """Whether a value is a method of a module, or a function wrapped around one, as in torchmetrics."""
    return callable(value) and getattr(inspect.unwrap(value), "__self__", None) is module


def _take_other_side(branches: list[bool], met: int) -> bool:
    """Turn the last branch that counted as false; False where there is none left."""
    del branches[met:]
    while branches and branches[-1]:
        branches.pop()
    if branches:
        branches[-1] = True
    return bool(branches)


def shallow_copy(module: nn.Module) -> Any:
    """A copy that shares parameters, buffers and children, but not the attributes that ``forward`` may set."""
    twin = object.__new__(type(module))
    state = vars(module).items()
    vars(twin).update({name: copy.copy(v) if isinstance(v, dict | list | set) else v for name, v in state})
    return twin


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the random states of torch, NumPy and Python as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one is what forwards draw from
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
