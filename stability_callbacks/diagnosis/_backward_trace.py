"""Following non-finite gradients through a backward pass, node by node, to where they came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stability_callbacks.diagnosis._gradient_reasons import reason_of_gradient
from stability_callbacks.diagnosis._origin import Origin
from stability_callbacks.diagnosis._reasons import overflow_of
from stability_callbacks.diagnosis._values import count, describe, is_finite, kinds, largest, numbers

__all__ = ["Break", "first_break", "node_name"]


class Break(NamedTuple):
    """A node of the autograd graph that made non-finite gradients.

    Args:
        order: Rises in the order of time.
        node: The node's name, such as ``"SqrtBackward0"``; ``"AccumulateGrad"`` where a sum of gradients overflowed.
        sequence_number: Tells when the node was made, see :meth:`ForwardTrace.site_of`.
        what: What happened, in words.
        parameter: Name of the parameter in whose gradient alone it shows, with ``"AccumulateGrad"``.
        reason: Why, one of ``REASONS``; None where that can't be told.
        origin: Where the non-finite values came from that the node worked with; None if they were finite.
    """

    order: int
    node: str
    sequence_number: int
    what: str
    parameter: str | None = None
    reason: str | None = None
    origin: Origin | None = None


OriginOf = Callable[[Sequence[Tensor], int, str], Origin | None]
"""Knows where the non-finite ones of a node's operands came from, by what it kept, its sequence number and its name."""


def first_break(loss: Tensor, parameters: Sequence[tuple[str, Tensor]], origin_of: OriginOf) -> Break | None:
    """Where a backward pass first breaks: which node gives non-finite gradients for finite ones.

    Of the nodes that do so, the first in the order of the backward pass whose gradients reach a parameter counts:
    gradients may be masked on their way. No ``.grad`` is written.

    Args:
        loss: The loss.
        parameters: Names and parameters.
        origin_of: Tells where non-finite values came from in the forward pass.

    Returns:
        The break; None if all gradients are finite.
    """
    wanted = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    if not wanted or loss.grad_fn is None:
        return None
    trace = _BackwardTrace(origin_of)
    with ExitStack() as hooks:
        for node in _nodes_below(loss.grad_fn):
            # Python keeps one object for each node as long as somebody holds it.
            hooks.callback(node.register_hook(partial(trace.note, node)).remove)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            loss, [each for _, each in wanted], torch.ones_like(loss), allow_unused=True
        )
    broken = [
        (name, gradient)
        for (name, _), gradient in zip(wanted, gradients, strict=True)
        if gradient is not None and not is_finite(gradient)
    ]
    if not broken:
        return None
    if trace.reached_parameters:
        return min(trace.reached_parameters)
    name, gradient = broken[0]
    what = (
        f"the gradient of {name} holds {describe(gradient)}, although all that is summed up in it is finite: the sum"
        " overflowed, or a gradient hook changed it"
    )
    kind = overflow_of(gradient.dtype) if gradient.is_floating_point() and "NaN" not in kinds(gradient) else None
    return Break(0, "AccumulateGrad", -1, what, name, kind)


def node_name(node: Node) -> str:
    """A node's name, such as ``"SqrtBackward0"``."""
    return node.name().rpartition("::")[2]


def _nodes_below(root: Node) -> list[Node]:
    nodes: dict[Node, None] = {root: None}
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in nodes and not _is_leaf(node):
                nodes[node] = None
                stack.append(node)
    return list(nodes)


def _is_leaf(node: Node) -> bool:
    return hasattr(node, "variable")  # it outlives the graph


class _BackwardTrace:
    """Notes at each node whether its gradients break there, or came broken."""

    def __init__(self, origin_of: OriginOf) -> None:
        self._origin_of = origin_of
        self.reached_parameters: set[Break] = set()
        self._reached: defaultdict[tuple[Node, int], set[Break]] = defaultdict(set)
        self._count = 0

    @torch.no_grad()
    def note(self, node: Node, grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        """Hook of a node: autograd's ``grad_outputs`` come in, its ``grad_inputs`` go out."""
        targets = [
            target for gradient, target in zip(grad_inputs, node.next_functions, strict=False) if _is_broken(gradient)
        ]
        if not targets:
            return
        sources = [index for index, gradient in enumerate(grad_outputs) if _is_broken(gradient)]
        breaks = set[Break]().union(*(self._reached[node, index] for index in sources))
        if not breaks:
            self._count += 1
            breaks = {self._break(node, grad_inputs, grad_outputs, bool(sources))}
        for target, index in targets:
            if target is None:
                continue
            if _is_leaf(target):
                self.reached_parameters |= breaks
            self._reached[target, index] |= breaks

    def _break(
        self,
        node: Node,
        grad_inputs: Sequence[Tensor | None],
        grad_outputs: Sequence[Tensor | None],
        came_broken: bool,
    ) -> Break:
        name, number = node_name(node), node._sequence_nr()
        if came_broken:
            what = f"{name} was given non-finite gradients: a sum of finite ones, or the result of a gradient hook"
            return Break(self._count, name, number, what)
        saved = saved_tensors(node)
        incoming = [gradient for gradient in grad_outputs if gradient is not None]
        size = max(map(largest, incoming), default=0.0)
        reason = reason_of_gradient(name, saved, incoming, [each for each in grad_inputs if each is not None])
        facts = [*filter(None, [reason.words]), f"the largest gradient given to it is {size:.6g}", *_saved_facts(saved)]
        what = f"{name} made non-finite gradients from finite ones ({', '.join(facts)})"
        origin = self._origin_of(list(saved.values()), number, name)
        return Break(self._count, name, number, what, None, reason.kind, origin)


def _is_broken(gradient: Tensor | None) -> bool:
    return gradient is not None and not is_finite(gradient)


def saved_tensors(node: Node) -> dict[str, Tensor]:
    """The floating-point tensors that a node kept of the forward pass, by name, as far as they can be read."""
    names = [each for each in dir(node) if each.startswith("_saved_") or each == "saved_tensors"]
    found: dict[str, Tensor] = {}
    for attribute in names:
        try:
            value = getattr(node, attribute)
        except RuntimeError:  # a checkpoint gives its tensors out once only, and the node had them
            continue
        several = list(value) if isinstance(value, tuple | list) else [value]
        for index, each in enumerate(several):
            if isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()):
                name = attribute.removeprefix("_saved_")
                found[name if len(several) == 1 else f"{name}[{index}]"] = each
    return found


def _saved_facts(saved: Mapping[str, Tensor]) -> list[str]:
    """What is striking about the tensors that a node kept from the forward pass."""
    facts = []
    for name, value in saved.items():
        if not is_finite(value):
            facts.append(f"`{name}` held {describe(value)}")
        elif zeros := count(numbers(value) == 0):
            facts.append(f"`{name}` held {zeros} zero{'' if zeros == 1 else 's'} in {numbers(value).numel()}")
        else:
            facts.append(f"`{name}` was at most {largest(value):.6g}")
    return facts
