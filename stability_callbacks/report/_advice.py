"""What incidents mean, and what to change: the words of their registered kinds, one piece for what belongs together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from stability_callbacks.diagnosis import Cause, Finding, Incident, cure_of, kind_of

__all__ = ["Advice", "Observation", "advise", "cure_of"]

_MOST_CAUSES = 5


class Observation(NamedTuple):
    """An incident, and its cause where it is known."""

    incident: Incident
    cause: Cause | None = None

    @property
    def phase(self) -> str:
        """Where the fault began, as in ``Cause.phase``; "unknown" where that is not known."""
        if self.cause is not None:
            return (self.cause.reproduced and self.cause.phase) or "unknown"
        return self.incident.phase

    @property
    def reason(self) -> str | None:
        """Why the operation broke, as in ``Cause.reason``; None where that is not known."""
        return self.incident.reason if self.cause is None else self.cause.reason


class Advice(NamedTuple):
    """Advice on incidents that have one thing in common. Backticks mark code in its texts.

    Attributes:
        kind: Their kind.
        times: How many there are.
        title: What they are.
        meaning: What they mean.
        changes: What to change, the most promising first.
        finding: All of them as one finding: the module that they have in common, the steps, the causes that were
            found, the most frequent first, and the first of ``changes``.
    """

    kind: str
    times: int
    title: str
    meaning: str
    changes: tuple[str, ...]
    finding: Finding


def advise(observations: Sequence[Observation]) -> list[Advice]:
    """Say what the incidents of a run mean and what to change: the gravest first, then the most frequent.

    Args:
        observations: The incidents and their causes, in order of steps.

    Returns:
        One piece of advice for each kind, and for non-finite steps one for each place and reason. The words are
        those of :func:`~stability_callbacks.diagnosis.kind_of` the incidents' kind.

    Example:
        >>> incident = Incident(7, 0, 7, 0, "nonfinite", {}, "skipped", module="head", operation="log")
        >>> [advice] = advise([Observation(incident)])
        >>> print(advice.title)
        `log` in module `head` made a value that is not finite
        >>> print(advice.changes[0])
        Use `stability_callbacks.numerics.safe_log`. For probabilities use `log_softmax` or `logsigmoid`.
        >>> advice.finding.severity, advice.finding.where
        ('error', 'head')
    """
    groups: defaultdict[tuple[str, ...], list[Observation]] = defaultdict(list)
    for each in observations:
        groups[_group(each)].append(each)
    ordered = sorted(
        groups.values(), key=lambda members: (kind_of(members[0].incident.kind).report_order, -len(members))
    )
    return [_advice_on(members) for members in ordered]


def _group(observation: Observation) -> tuple[str, ...]:
    """What incidents have in common that one piece of advice is for."""
    incident, phase = observation.incident, observation.phase
    kind = kind_of(incident.kind)
    if not kind.phases:
        return (incident.kind,)
    if not kind.wording(phase).is_of_a_place:
        return incident.kind, phase
    return incident.kind, phase, incident.module or "", incident.operation or "", observation.reason or ""


def _advice_on(members: Sequence[Observation]) -> Advice:
    first, last = members[0].incident, members[-1].incident
    wording = first.wording(members[0].phase, last.step, members[0].reason)
    modules = {each.incident.module or "" for each in members}
    causes = Counter(cause for each in members for cause in _causes(each))
    finding = Finding(
        first.kind,
        kind_of(first.kind).severity,
        where=modules.pop() if len(modules) == 1 else "",
        evidence={"times": len(members), "first step": first.step, "last step": last.step},
        causes=tuple(cause for cause, _ in causes.most_common(_MOST_CAUSES)),
        remedy=wording.remedies[0],
    )
    return Advice(first.kind, len(members), wording.title, wording.meaning, wording.remedies, finding)


def _causes(observation: Observation) -> tuple[str, ...]:
    if observation.cause is None:
        return observation.incident.finding().causes
    return (observation.cause.explanation,) if observation.cause.reproduced else ()
