"""The kinds of findings: one registry that the record, the report and the diagnosis read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

from stability_callbacks._validation import check_bool, check_choice, check_instance, check_integer
from stability_callbacks.diagnosis._finding import Severity

__all__ = ["KINDS", "Kind", "Wording", "kind_of", "register_kind"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_ -]*(?<! )")
_COLOR = re.compile(r"#[0-9A-Fa-f]{6}")
_GAP = re.compile(r"\{(\w+)\}")
_GRAY, _DARK_GRAY = "#626b76", "#98a2ae"


def _check_color(name: str, value: Any) -> None:
    if not _COLOR.fullmatch(check_instance(name, value, str, "a string")):
        raise ValueError(f"`{name}` must be a color written #rrggbb, got {value!r}")


def _check_texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"`{name}` must be a sequence of strings, got {value!r} of type {type(value).__name__}")
    return tuple(check_instance(f"{name}[{place}]", each, str, "a string") for place, each in enumerate(value))


@dataclass(frozen=True)
class Wording:
    """What a finding is called, what it means, and what to change. Backticks mark code.

    The texts may hold gaps that an incident fills in, see :meth:`Incident.wording`: ``{operation}``, ``{where}``,
    ``{at}`` (the line of source), ``{cure}`` (what to write instead of the operation), ``{reason}`` (why it broke),
    ``{first}`` and ``{last}`` (steps).

    Attributes:
        title: What it is, in a line.
        meaning: What it means for the run.
        remedies: What to change, the most promising first.
    """

    title: str
    meaning: str
    remedies: tuple[str, ...]

    def __post_init__(self) -> None:
        check_instance("title", self.title, str, "a string")
        check_instance("meaning", self.meaning, str, "a string")
        object.__setattr__(self, "remedies", _check_texts("remedies", self.remedies))

    @property
    def is_of_a_place(self) -> bool:
        """Whether the title names the place, so that each place is a finding of its own."""
        return bool({"operation", "where"} & set(_GAP.findall(self.title)))

    def filled(self, facts: Mapping[str, str]) -> Wording:
        """The texts with facts in their gaps; other braces stay as they are.

        Example:
            >>> Wording("`{operation}` broke", "A set is written {1, 2}.", ()).filled({"operation": "log"}).title
            '`log` broke'
        """

        def fill(text: str) -> str:
            return _GAP.sub(lambda gap: facts.get(gap[1], gap[0]), text)

        return Wording(fill(self.title), fill(self.meaning), tuple(map(fill, self.remedies)))


_UNKNOWN = Wording(
    "A detector of your own spoke up",
    "Its evidence is in the table of incidents.",
    ("Look at these steps in the curves, and at their bundles.",),
)


@dataclass(frozen=True)
class Kind:
    """A kind of finding, and all that the record, the report and the diagnosis need to know of it.

    Register one for a detector of your own, so that the report shows it in its own color and says what to change.

    Attributes:
        name: Its name: words of ASCII letters, digits, underscores and hyphens, that does not begin with a digit.
        severity: How grave a finding of this kind is unless it says otherwise. Default ``"warning"``.
        precedence: Of several kinds that detectors vote for in one step, the one with the lowest precedence names the
            incident, since it says most about the cause. Default 50.
        bundled: Whether a batch, the weights and the random state can reproduce it, so that a bundle is worth its room.
        color: Its color in the report, as ``#rrggbb``, on a light page.
        dark_color: The same on a dark page. Default: ``color``.
        gravity: The report tells errors before warnings, and those before what is worth knowing; of one severity, the
            kinds with the highest gravity first, and of one gravity the most frequent. Default 0.
        title: What it is, in a line; as the following, see :class:`Wording`.
        meaning: What it means for the run.
        remedies: What to change, the most promising first.
        phases: Other words where it is known in which phase of the step it began, by ``Cause.phase``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the name is no word, the severity is not one, or a color is not ``#rrggbb``.

    Example:
        >>> kind = Kind("slow_batch", "info", color="#008080", title="A batch came late", remedies=("Add workers.",))
        >>> kind.wording().remedies
        ('Add workers.',)
        >>> Kind("slow: batch")
        Traceback (most recent call last):
        ...
        ValueError: `name` must be words of ASCII letters, digits, underscores and hyphens, got 'slow: batch'
    """

    name: str
    severity: Severity = "warning"
    precedence: int = 50
    bundled: bool = False
    color: str = _GRAY
    dark_color: str = ""
    gravity: int = 0
    title: str = ""
    meaning: str = ""
    remedies: tuple[str, ...] = ()
    phases: Mapping[str, Wording] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(check_instance("name", self.name, str, "a string")):
            allowed = "words of ASCII letters, digits, underscores and hyphens"
            raise ValueError(f"`name` must be {allowed}, got {self.name!r}")
        check_choice("severity", self.severity, get_args(Severity))
        check_integer("precedence", self.precedence)
        check_integer("gravity", self.gravity)
        check_bool("bundled", self.bundled)
        _check_color("color", self.color)
        if self.dark_color != "":
            _check_color("dark_color", self.dark_color)
        else:
            object.__setattr__(self, "dark_color", _DARK_GRAY if self.color == _GRAY else self.color)
        wording = Wording(self.title, self.meaning, self.remedies)
        object.__setattr__(self, "remedies", wording.remedies)
        check_instance("phases", self.phases, Mapping, "a mapping from phases to Wording")  # type: ignore[type-abstract]
        for phase, each in self.phases.items():
            check_instance("phases", phase, str, "a mapping from phases (strings) to Wording")
            check_instance(f"phases[{phase!r}]", each, Wording, "a Wording")
        object.__setattr__(self, "phases", dict(self.phases))

    def wording(self, phase: str = "") -> Wording:
        """Its words, or those of a phase; what was not given is said in general terms.

        Args:
            phase: Where it began, as ``Cause.phase``, where that is known.
        """
        own = Wording(self.title, self.meaning, self.remedies)
        known = [self.phases.get(phase, own), own, _UNKNOWN]
        return Wording(
            next(each.title for each in known if each.title),
            next(each.meaning for each in known if each.meaning),
            next(each.remedies for each in known if each.remedies),
        )

    @property
    def report_order(self) -> tuple[int, int]:
        """Sorts kinds as the report tells them: the gravest first."""
        return -get_args(Severity).index(self.severity), -self.gravity


_registered: dict[str, Kind] = {}

KINDS = MappingProxyType(_registered)
"""All registered kinds, by name."""


def register_kind(kind: Kind) -> Kind:
    """Make a kind known to the record, the report and the diagnosis; one of the same name is replaced.

    Call it where your detector is defined, so that whoever imports it knows the kind. A report knows the kinds that
    are registered in the process that writes it.

    Args:
        kind: The kind.

    Returns:
        It.

    Raises:
        TypeError: If it is not a kind.

    Example:
        >>> register_kind(Kind("slow_batch", severity="info")).name
        'slow_batch'
        >>> kind_of("slow_batch").severity
        'info'
    """
    check_instance("kind", kind, Kind, "a Kind")
    _registered[kind.name] = kind
    return kind


def kind_of(name: str) -> Kind:
    """The registered kind of this name; one with the defaults where there is none.

    Args:
        name: The name, as a detector or a record gives it. If it is no word, the kind is called ``"other"``.

    Example:
        >>> from stability_callbacks.diagnosis import kind_of
        >>> kind_of("nonfinite").severity, kind_of("made_up").severity
        ('error', 'warning')
    """
    return _registered.get(name) or Kind(name if _NAME.fullmatch(name) else "other")
