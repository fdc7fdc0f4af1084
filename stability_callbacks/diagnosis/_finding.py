"""What is found in a training run, in one vocabulary for incidents, reports and diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Finding", "Severity"]

Severity = Literal["info", "warning", "error"]
"""``"error"``: the run is ruined or will not learn; ``"warning"``: it may be; ``"info"``: worth knowing."""


@dataclass(frozen=True)
class Finding:
    """Something found in a run: what it is, how grave, where, which numbers show it, why, and what to do.

    Attributes:
        kind: Name of a registered :class:`~stability_callbacks.diagnosis.Kind`, such as ``"nonfinite"``.
        severity: ``"info"``, ``"warning"`` or ``"error"``.
        where: Full name of a module or parameter; ``""`` for the whole run.
        evidence: Named numbers and texts that show it.
        causes: Likely causes, the most likely first.
        remedy: What to change.

    Example:
        >>> finding = Finding("spike", "warning", evidence={"loss": 80.0}, remedy="lower the learning rate")
        >>> print(finding)
        spike: loss 80. Remedy: lower the learning rate.
    """

    kind: str
    severity: Severity
    where: str = ""
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    causes: tuple[str, ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        place = f" in {self.where}" if self.where else ""
        facts = ", ".join(f"{name} {_text(value)}" for name, value in self.evidence.items())
        parts = [f"{self.kind}{place}" + (f": {facts}" if facts else "")]
        if self.causes:
            parts.append(f"Cause: {self.causes[0]}".rstrip("."))
        if self.remedy:
            parts.append(f"Remedy: {self.remedy}".rstrip("."))
        return ". ".join(parts) + "."


def _text(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
