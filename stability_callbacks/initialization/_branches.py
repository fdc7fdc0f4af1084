"""Which layers end the residual branches of a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd

from stability_callbacks.activations import named_modules
from stability_callbacks.initialization._call_graph import TORCH_TRANSFORMER_LAYERS, Call, CallGraph, operation

__all__ = ["residual_layers"]

Kinds = tuple[type[nn.Module], ...]

_ADDITIONS = {"add", "iadd", "add_"}
_KERNEL_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)


def residual_layers(call_graph: CallGraph, kinds: Kinds) -> list[str]:
    """The last layer of each residual branch.

    A residual branch is what a ``forward`` adds to a value that it was computed from, or to a projection of that value.

    Args:
        call_graph: The model's call_graph.
        kinds: The types of layers that count.

    Returns:
        The layers' full names, each once; a branch without such a layer has none.
    """
    return list(dict.fromkeys(_residual_layers(call_graph, kinds)))


def _residual_layers(call_graph: CallGraph, kinds: Kinds) -> Iterator[str]:
    for name, module in call_graph.modules.items():
        if isinstance(module, TORCH_TRANSFORMER_LAYERS):
            # Their `forward` cannot be read, but is known.
            yield from (f"{child}.out_proj" for child in call_graph.children(name) if child.endswith("attn"))
            yield from (child for child in call_graph.children(name) if child.endswith("linear2"))
        graph = call_graph.graph(name)
        for node in graph.nodes if graph is not None else ():
            if operation(node) in _ADDITIONS and len(node.all_input_nodes) == 2:
                yield from _branch_end(call_graph, name, node.all_input_nodes, kinds)


def _branch_end(call_graph: CallGraph, name: str, summands: list[Node], kinds: Kinds) -> Iterator[str]:
    """The last layer of the residual branch that is one of two summands, if one of them is."""
    upstream = {node: _upstream(node) for node in summands}
    shared = set.intersection(*upstream.values())
    kernels = {
        node: sum(_kernels(call_graph, Call(name, each)) for each in upstream[node] - shared) for node in upstream
    }
    branch, shortcut = sorted(upstream, key=kernels.__getitem__, reverse=True)
    if shared and kernels[shortcut] <= 1 and kernels[branch] > kernels[shortcut]:
        last = _last_layer(call_graph, Call(name, branch), shared, kinds)
        if last is not None:
            yield last


def _last_layer(call_graph: CallGraph, call: Call, stop: set[Node], kinds: Kinds) -> str | None:
    """The first layer of some kinds that is met on the way back from a node."""
    nodes, seen = deque([call.node]), set(stop)
    while nodes:
        node = nodes.popleft()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module":
            last = _last_layer_in(call_graph, call_graph.callee(Call(call.module, node)), kinds)
            if last is not None:
                return last
        nodes.extend(node.all_input_nodes)
    return None


def _last_layer_in(call_graph: CallGraph, name: str, kinds: Kinds) -> str | None:
    module = call_graph.modules[name]
    if isinstance(module, kinds):
        return name
    graph = call_graph.graph(name) if module._modules else None
    if graph is not None:
        return _last_layer(call_graph, Call(name, graph.output_node()), set(), kinds)
    layers = [each for each, layer in named_modules(module) if isinstance(layer, kinds)]
    return ".".join(filter(None, (name, layers[-1]))) if layers else None


def _kernels(call_graph: CallGraph, call: Call) -> int:
    """How many layers with a kernel a node calls."""
    if call.node.op != "call_module":
        return 0
    return sum(isinstance(each, _KERNEL_LAYERS) for each in call_graph.modules[call_graph.callee(call)].modules())


def _upstream(node: Node) -> set[Node]:
    """A node and all that it is computed from."""
    found, nodes = set[Node](), [node]
    while nodes:
        node = nodes.pop()
        if node not in found:
            found.add(node)
            nodes.extend(node.all_input_nodes)
    return found
