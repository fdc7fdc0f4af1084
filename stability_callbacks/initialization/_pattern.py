"""Different policies for different parts of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stability_callbacks._validation import check_instance, check_pattern
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._initializers import Initializer
from stability_callbacks.initialization._layer_parameters import LayerParameter, layer_parameters
from stability_callbacks.initialization._policy import LeaveAlone, Plan, Policy

__all__ = ["ByPattern"]


class ByPattern(Policy):
    r"""A policy for each part of a model, chosen by parameter name.

    Patterns are regular expressions searched in the parameter's full name; the first that matches decides. Parameters
    that none matches are left alone. With it a pretrained body is spared and a new head is initialized.

    Args:
        policies: From pattern to policy, in order; ``None`` leaves the parameters alone.

    Raises:
        TypeError: If ``policies`` is not a mapping, or maps to something else; or to a policy that needs a batch, which
            looks at the whole model.
        ValueError: If it is empty, or a pattern is not a regular expression. When applied: if a pattern is not found in
            any parameter's name, so that a slip of the pen does not go unseen.

    Example:
        >>> from stability_callbacks.initialization import Normal
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> for row in ByPattern({"^body": None, r"head\.weight": Normal(std=0.01)}).apply(model):
        ...     print(f"{row.name}: {row.what}")
        body.weight: left alone: as the pattern '^body' says
        body.bias: left alone: as the pattern '^body' says
        head.weight: normal, std 0.01
        head.bias: left alone: no pattern matches
    """

    def __init__(self, policies: Mapping[str, Policy | None]) -> None:
        if not isinstance(policies, Mapping):
            raise TypeError(
                f"`policies` must map patterns to policies, got {policies!r} of type {type(policies).__name__}"
            )
        if not policies:
            raise ValueError("`policies` must have at least one pattern, got an empty mapping")
        for pattern, policy in policies.items():
            check_pattern("policies", pattern)
            if policy is not None:
                check_instance(f"policies[{pattern!r}]", policy, Policy, "a policy or None")  # type: ignore[type-abstract]
                if policy.needs_batch:
                    raise TypeError(f"`policies[{pattern!r}]` must be a policy that needs no batch, got {policy!r}")
        self.policies = dict(policies)

    def plan(self, model: nn.Module) -> Plan:
        plans = {pattern: policy.plan(model) for pattern, policy in self.policies.items() if policy is not None}
        patterns = {pattern: check_pattern("policies", pattern) for pattern in self.policies}
        names = [param.name for param in layer_parameters(model)]
        unused = [pattern for pattern, regex in patterns.items() if not any(map(regex.search, names))]
        if unused:
            raise ValueError(
                f"`policies` must have patterns that are found in a parameter's name, got {unused!r}; the names are"
                f" {', '.join(names)}"
            )
        plan: dict[str, Initializer | LeaveAlone] = {}
        for name in names:
            pattern = next((pattern for pattern, regex in patterns.items() if regex.search(name)), None)
            if pattern is None:
                plan[name] = LeaveAlone("no pattern matches")
            elif pattern not in plans:
                plan[name] = LeaveAlone(f"as the pattern {pattern!r} says")
            elif name in plans[pattern]:
                plan[name] = plans[pattern][name]
        return plan

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        """Say what the first policy whose pattern matches says."""
        for pattern, policy in self.policies.items():
            if check_pattern("policies", pattern).search(param.name):
                return None if policy is None else policy.rule(param, call_graph)
        return None
