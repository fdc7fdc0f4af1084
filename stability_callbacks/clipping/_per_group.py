"""Different rules for different parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stability_callbacks._validation import check_instance, check_pattern
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import (
    GradientNorms,
    Parameters,
    combine_norms,
    measure_gradients,
    named_parameters,
)

__all__ = ["PerGroup"]


class PerGroup(ClipRule):
    """Apply to each parameter the rule of the first name pattern that matches it.

    For models whose parts need different thresholds: embeddings, heads, a fine-tuned backbone. Each rule sees the
    parameters of its group only, so a :class:`NormClip` bounds that group's norm. A parameter that no pattern matches
    is an error; end with ``".*": None`` to leave the rest alone.

    Args:
        rules: Regular expression, searched in the full parameter name, to rule; None leaves the group alone. In order:
            the first match wins.

    Raises:
        TypeError: If ``rules`` is not a mapping to rules.
        ValueError: If there is no rule, or a pattern is not a regular expression; in :meth:`clip_`, if a pattern
            matches no parameter or a parameter no pattern.

    Example:
        >>> from stability_callbacks.clipping import NormClip
        >>> rule = PerGroup({"^embedding": NormClip(0.1), ".*": None})
        >>> embedding, head = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> embedding.grad, head.grad = torch.ones(1), torch.ones(1)
        >>> _ = rule.clip_([("embedding.weight", embedding), ("head.weight", head)])
        >>> embedding.grad, head.grad
        (tensor([0.1000]), tensor([1.]))
    """

    def __init__(self, rules: Mapping[str, ClipRule | None]) -> None:
        allowed = 'a mapping of name patterns to clip rules (or None), such as {".*": NormClip(1.0)}'
        check_instance("rules", rules, Mapping, allowed)  # type: ignore[type-abstract]
        if not rules:
            raise ValueError(f"`rules` must be {allowed}, got {rules!r}")
        for pattern, rule in rules.items():
            check_pattern("rules", pattern)
            if rule is not None:
                check_instance(f"rules[{pattern!r}]", rule, ClipRule, "a clip rule or None")  # type: ignore[type-abstract]
        self.rules = dict(rules)
        self.linear = all(rule is None or rule.linear for rule in self.rules.values())  # type: ignore[misc]
        self._group_of: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"PerGroup({self.rules!r})"

    def state_dict(self) -> dict[str, Any]:
        return {pattern: rule.state_dict() for pattern, rule in self.rules.items() if rule is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for pattern, state in state_dict.items():
            rule = self.rules.get(pattern)
            if rule is not None:
                rule.load_state_dict(state)

    def assign(self, names: Iterable[str]) -> None:
        """Find each parameter's group, once for all parameters that there are.

        Args:
            names: Full parameter names.

        Raises:
            ValueError: If a pattern matches no name, or a name no pattern; a rule of a group may object too.
        """
        names = list(names)
        patterns = {pattern: check_pattern("rules", pattern) for pattern in self.rules}
        unmatched = []
        for name in names:
            group = next((pattern for pattern, compiled in patterns.items() if compiled.search(name)), None)
            if group is None:
                unmatched.append(name)
            else:
                self._group_of[name] = group
        idle = [pattern for pattern, compiled in patterns.items() if not any(compiled.search(name) for name in names)]
        if unmatched:
            raise ValueError(f"no pattern of PerGroup matches {_few(unmatched)}; patterns: {', '.join(self.rules)}")
        if idle:
            raise ValueError(f"PerGroup's patterns {_few(idle)} match no parameter; parameters: {_few(names)}")

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        every = named_parameters(parameters)
        if any(name not in self._group_of for name, _ in every):
            self.assign(name for name, _ in every)
        pairs = [(name, parameter) for name, parameter in every if parameter.grad is not None]
        norms = self.measure(pairs, norms)
        # A group whose own norm is finite is left alone too where another's is not: the step is bad.
        masked = torch.where(torch.isfinite(norms.total), norms.per_tensor, float("nan"))
        members: dict[str, list[int]] = {}
        for index, (name, _) in enumerate(pairs):
            members.setdefault(self._group_of[name], []).append(index)
        each = masked.unbind()
        totals: list[Tensor] = []
        for pattern, indices in members.items():
            own = torch.stack([each[index] for index in indices])
            rule = self.rules[pattern]
            total = combine_norms(own, norms.norm_type)
            if rule is not None:
                group = [pairs[index] for index in indices]
                known = GradientNorms(tuple(name for name, _ in group), own, total, norms.norm_type)
                if rule.norm_type != norms.norm_type:
                    known = measure_gradients(group, rule.norm_type)
                    known = known._replace(total=torch.where(torch.isfinite(total), known.total, float("nan")))
                result = rule.clip_(group, known)
                total = total * result.coefficient
            totals.append(total)
        clipped = combine_norms(torch.stack(totals), norms.norm_type) if totals else norms.total
        return ClipResult.between(norms.total, clipped)


def _few(names: list[str], most: int = 10) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
