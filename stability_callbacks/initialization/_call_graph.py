"""How the layers of a model are connected, read from its ``forward`` methods one module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.fx import Graph, Node

from stability_callbacks._names import plain_name
from stability_callbacks.activations import modules_by_name
from stability_callbacks.initialization._tracing import trace_forward

__all__ = ["TORCH_TRANSFORMER_LAYERS", "Call", "CallGraph", "is_torch_layer", "operation"]

TORCH_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CONTAINER_FILES = {"torch.nn.modules.container", "torch.nn.modules.module"}


class Call(NamedTuple):
    """A node of the graph of a module's ``forward``: an input, or a call of a child, a function or a method.

    Attributes:
        module: Full name of the module whose ``forward`` it is in.
        node: The node.
    """

    module: str
    node: Node


class CallGraph:
    """How the layers of a model are connected.

    Each module's own ``forward`` is read by itself, with its children as single nodes, so one that cannot be read
    affects nothing but its own level. Nothing about the model changes: neither modes, buffers and hooks, nor any random
    state. Names are full names without the segments that wrappers such as ``torch.compile`` add.

    Args:
        model: The model; its modules are read when asked for, once.

    Attributes:
        modules: The model's modules by all of their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_by_name(model)
        self._names: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            self._names.setdefault(id(module), []).append(name)
        self._graphs: dict[str, Graph | None] = {}
        self._calls: dict[str, dict[str, Node]] = {}

    def graph(self, name: str) -> Graph | None:
        """The graph of a module's own ``forward``; None where it cannot be read, or is torch's own business."""
        if name not in self._graphs:
            module = self.modules[name]
            readable = isinstance(module, nn.Sequential) or not is_torch_layer(module)
            self._graphs[name] = trace_forward(module) if readable else None
        return self._graphs[name]

    def call_of(self, name: str) -> Call | None:
        """The first call of a module, in the nearest module around it that calls it, under any of its names."""
        for alias in self._names[id(self.modules[name])]:
            for around in _ancestors(alias):
                if (node := self._calls_in(around).get(alias)) is not None:
                    return Call(around, node)
        return None

    def callee(self, call: Call) -> str:
        """Full name of the module that a ``call_module`` node calls."""
        return self._join(call.module, str(call.node.target))

    def children(self, name: str) -> list[str]:
        """Full names of a module's children, in the order of registration."""
        children = self.modules[name]._modules.items()
        return list(dict.fromkeys(self._join(name, child) for child, module in children if module is not None))

    def _join(self, around: str, name: str) -> str:
        return ".".join(filter(None, (around, plain_name(name, self.modules[around]))))

    def _calls_in(self, name: str) -> dict[str, Node]:
        if name not in self._calls:
            graph = self.graph(name)
            nodes = [node for node in graph.nodes if node.op == "call_module"] if graph is not None else []
            self._calls[name] = {self.callee(Call(name, node)): node for node in reversed(nodes)}
        return self._calls[name]


def is_torch_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, or made from one, and more than a container."""
    files = {base.__module__ for base in type(module).__mro__} - _CONTAINER_FILES
    return any(name.startswith("torch.nn.") for name in files)


def operation(node: Node) -> str:
    """Name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
