"""Which activation follows a layer."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from stability_callbacks.initialization._call_graph import (
    TORCH_TRANSFORMER_LAYERS,
    Call,
    CallGraph,
    is_torch_layer,
    operation,
)
from stability_callbacks.initialization._gain import (
    NO_ACTIVATION,
    Activation,
    module_activation,
    named_activation,
    second_moment_gain,
)
from stability_callbacks.initialization._tracing import preserved_randomness, shallow_copy

__all__ = ["activation_after"]

# Modules of these files of torch.nn are looked through: they normalize, pool, mask or rearrange.
_TRANSPARENT_FILES = {
    f"torch.nn.modules.{name}"
    for name in (
        "batchnorm",
        "channelshuffle",
        "dropout",
        "flatten",
        "fold",
        "instancenorm",
        "normalization",
        "padding",
        "pixelshuffle",
        "pooling",
        "upsampling",
    )
}
# So are a user's own normalization layers, known by their names.
_NORM_CLASS = re.compile(r"norm(\dd)?$", re.IGNORECASE)
# And so are functions and methods of these names.
_TRANSPARENT_OPERATIONS = re.compile(
    r"(cat|concat|concatenate|stack|chunk|split|unbind|getitem"
    r"|(alpha_|feature_|feature_alpha_)?dropout([123]d)?|\w+_norm"
    r"|(adaptive_)?(avg|max)_pool[123]d|lp_pool[123]d|mean|interpolate|upsample|pad|pixel_(un)?shuffle"
    r"|flatten|unflatten|reshape|view|permute|transpose|swapaxes|swapdims|movedim|moveaxis|t|squeeze|unsqueeze|expand"
    r"|expand_as|view_as|reshape_as|contiguous|clone|to|type|type_as|float|half|bfloat16|double|cuda|cpu)_?"
)
_ADDITIONS = {"add", "iadd", "add_"}
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_PROBE = torch.linspace(-3, 3, 61, dtype=torch.float64)


class _Place(NamedTuple):
    """A place that a layer's output has come to.

    Attributes:
        module: Full name of the module whose ``forward`` it is in.
        node: The node whose value it is in that ``forward``; where that cannot be read, the number of the child that
            comes next in the order of registration.
        added: Whether it has been added to something on its way: it is not followed all along a residual stream.
    """

    module: str
    node: Node | int
    added: bool = False


def activation_after(call_graph: CallGraph, name: str) -> Activation:
    """The first activation that a layer's output meets.

    Functions and methods (``F.relu(x)``, ``x.tanh()``) are seen as modules are. Norms, dropout, pooling, padding,
    changes of shape or type, the borders of modules, and one residual addition are looked through; another layer, an
    unknown function, or the end of the model ends the search. Where a ``forward`` cannot be read, the order of
    registration stands in for it. A user's own activation module is known by what it does to a few numbers.

    Args:
        call_graph: The model's call_graph.
        name: The layer's full name.

    Returns:
        The activation; ``NO_ACTIVATION`` where there is none or it cannot be told.
    """
    if (inside := _inside_torch_transformer(call_graph, name)) is not None:
        return inside
    places, seen = deque(_leaving(call_graph, name, added=False)), set[_Place]()
    while places:
        place = places.popleft()
        if place in seen:
            continue
        seen.add(place)
        for met in _next(call_graph, place):
            if isinstance(met, Activation):
                return met
            places.append(met)
    return NO_ACTIVATION


def _next(call_graph: CallGraph, place: _Place) -> Iterator[Activation | _Place]:
    """What comes after a place: activations, and places to go on from."""
    if isinstance(place.node, int):
        children = call_graph.children(place.module)
        if place.node < len(children):
            yield from _meeting(call_graph, children[place.node], place._replace(node=place.node + 1), place)
        return
    for user in place.node.users:
        after = place._replace(node=user)
        if user.op == "output":
            yield from _leaving(call_graph, place.module, place.added)
        elif user.op == "call_module":
            yield from _meeting(call_graph, call_graph.callee(Call(place.module, user)), after, place)
        elif (activation := _operation_activation(user)) is not None:
            yield activation
        elif operation(user) in _ADDITIONS and not place.added:
            yield after._replace(added=True)
        elif _TRANSPARENT_OPERATIONS.fullmatch(operation(user)):
            yield after


def _meeting(call_graph: CallGraph, name: str, after: _Place, before: _Place) -> Iterator[Activation | _Place]:
    """What a value meets in a module: the activation that it is, the place behind it, or its inside."""
    module = call_graph.modules[name]
    if _is_transparent(module):
        yield after
    elif (activation := module_activation(module)) is not None:
        yield activation
    elif not is_torch_layer(module):
        probed = _probe(module)
        if probed is None:
            yield from _entering(call_graph, name, after, before)
        else:
            yield after if probed is NO_ACTIVATION else probed


def _entering(call_graph: CallGraph, name: str, after: _Place, before: _Place) -> Iterator[_Place]:
    """The inputs of a module that get a value; the first child, where its ``forward`` cannot be read."""
    graph = call_graph.graph(name)
    if graph is None:
        yield _Place(name, 0, before.added)
        return
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    call, value = after.node, before.node
    if isinstance(call, Node):
        positions = [index for index, each in enumerate(call.args) if each is value]
        keywords = {keyword for keyword, each in call.kwargs.items() if each is value}
        receiving = [each for index, each in enumerate(inputs) if index in positions or each.target in keywords]
        inputs = receiving or inputs
    for each in inputs:
        yield _Place(name, each, before.added)


def _leaving(call_graph: CallGraph, name: str, added: bool) -> list[_Place]:
    """Where a module's output goes on."""
    if (call := call_graph.call_of(name)) is not None:
        return [_Place(*call, added)]
    parent = name.rpartition(".")[0]
    if name and call_graph.graph(parent) is None:
        return [_Place(parent, call_graph.children(parent).index(name) + 1, added)]
    return []


def _inside_torch_transformer(call_graph: CallGraph, name: str) -> Activation | None:
    """What follows a layer of torch's own transformer layers, whose ``forward`` cannot be read."""
    parent, _, attribute = name.rpartition(".")
    layer = call_graph.modules[parent]
    if not isinstance(layer, TORCH_TRANSFORMER_LAYERS):
        return None
    if attribute != "linear1":
        return NO_ACTIVATION
    function: Any = layer.activation
    if isinstance(function, nn.Module):
        return module_activation(function) or NO_ACTIVATION
    return named_activation(getattr(function, "__name__", ""), function) or NO_ACTIVATION


def _operation_activation(node: Node) -> Activation | None:
    """The activation that a function or method is, with its arguments."""
    name = operation(node)
    settings = [*node.args[1:], *node.kwargs.values()]
    if named_activation(name) is None or any(isinstance(each, Node) for each in settings):
        return None
    target: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    return named_activation(name, lambda z: target(z, *node.args[1:], **node.kwargs))


def _is_transparent(module: nn.Module) -> bool:
    files = {base.__module__ for base in type(module).__mro__}
    known = isinstance(module, nn.Identity) or not files.isdisjoint(_TRANSPARENT_FILES)
    return known or (not module._modules and _NORM_CLASS.search(type(module).__name__) is not None)


def _probe(module: nn.Module) -> Activation | None:
    """Try what a user's module does to numbers, if it is plain: nothing in it but settings.

    Returns:
        ``NO_ACTIVATION`` if it leaves them as they are; an activation if it maps each by itself; None if it is anything
        else, or cannot be told.
    """
    if not _is_plain(module):
        return None
    evaluating = shallow_copy(module)
    evaluating.training = False
    try:
        with torch.no_grad(), preserved_randomness():
            whole, part = evaluating.forward(_PROBE.clone()), evaluating.forward(_PROBE[20:40].clone())
            if not (isinstance(whole, Tensor) and whole.shape == _PROBE.shape and torch.allclose(whole[20:40], part)):
                return None
            if torch.equal(whole, _PROBE):
                return NO_ACTIVATION
            gain = second_moment_gain(evaluating.forward)
    except Exception:  # noqa: BLE001  # a user's forward may raise anything when it meets a vector
        return None
    return Activation(type(module).__name__, gain, saturating=False) if math.isfinite(gain) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has no parameters, buffers and children, and no attributes but settings."""
    own = [value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES]
    settled = all(isinstance(value, str | int | float | None) for value in own)
    return settled and not (module._parameters or module._buffers or module._modules)
