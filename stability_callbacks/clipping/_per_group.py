"""Different rules for different parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stability_callbacks._patterns import check_patterns, first_matches
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import (
    GradientNorms,
    Parameters,
    combine_norms,
    measure_gradients,
    named_parameters,
)
from stability_callbacks.schedules import Schedule

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
        self.rules = check_patterns("rules", rules, ClipRule, "a clip rule", allowed)  # type: ignore[type-abstract]
        # The norms of a rule of another type are measured here, of the gradients as they are.
        self.linear = all(  # type: ignore[misc]
            rule is None or (rule.linear and rule.norm_type == self.norm_type) for rule in self.rules.values()
        )
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

    def assign(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Find each parameter's group, once for all parameters that there are.

        Args:
            parameters: All parameters, with their full names.

        Raises:
            ValueError: If a pattern matches none of them, or one of them no pattern; names are listed.
        """
        parameters = list(parameters)
        self._group_of.update(first_matches(self.rules, [name for name, _ in parameters], "PerGroup", "parameter"))
        for pattern, rule in self.rules.items():
            if rule is not None:
                rule.assign(pair for pair in parameters if self._group_of[pair[0]] == pattern)

    @property
    def schedules(self) -> Sequence[Schedule]:
        return [schedule for rule in self.rules.values() if rule is not None for schedule in rule.schedules]

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        for rule in self.rules.values():
            if rule is not None:
                rule.set_step(step, total_steps)

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        every = named_parameters(parameters)
        if any(name not in self._group_of for name, _ in every):
            self.assign(every)
        pairs = [(name, parameter) for name, parameter in every if parameter.grad is not None]
        norms = self.measure(pairs, norms)
        # A group whose own norm is finite is left alone too where another's is not: the step is bad.
        masked = torch.where(torch.isfinite(norms.total), norms.per_tensor, float("nan"))
        members: dict[str, list[int]] = {}
        for index, (name, _) in enumerate(pairs):
            members.setdefault(self._group_of[name], []).append(index)
        each = masked.unbind()
        totals: list[Tensor] = []
        coefficients: list[Tensor] = []
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
                coefficients.append(result.coefficient)
            totals.append(total)
        for pattern, rule in self.rules.items():
            if rule is not None and rule.schedules and pattern not in members:
                rule.clip_(())  # a step without gradients for it is a step of its schedule too
        if not coefficients:
            return ClipResult.between(norms.total, norms.total)
        return ClipResult.from_parts(norms.total, torch.stack(totals), torch.stack(coefficients), norms.norm_type)
