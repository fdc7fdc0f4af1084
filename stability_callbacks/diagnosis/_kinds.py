"""The kinds of findings: one registry that the record, the report and the diagnosis read."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from stability_callbacks.diagnosis._finding import Severity

__all__ = ["KINDS", "Kind", "kind_of", "register_kind"]


@dataclass(frozen=True)
class Kind:
    """A kind of finding, and all that the record, the report and the diagnosis need to know of it.

    Attributes:
        name: Its name: a word, with underscores.
        severity: How grave a finding of this kind is unless it says otherwise. Default ``"warning"``.
        precedence: Of several kinds that detectors vote for in one step, the one with the lowest precedence names the
            incident, since it says most about the cause. Default 50.
        bundled: Whether a batch, the weights and the random state can reproduce it, so that a bundle is worth its room.
        color: Its color in the report, as ``#rrggbb``, on a light page.
        dark_color: The same on a dark page.
    """

    name: str
    severity: Severity = "warning"
    precedence: int = 50
    bundled: bool = False
    color: str = "#626b76"
    dark_color: str = "#98a2ae"


_registered: dict[str, Kind] = {}

KINDS = MappingProxyType(_registered)
"""All registered kinds, by name."""


def register_kind(kind: Kind) -> Kind:
    """Make a kind known to the record, the report and the diagnosis; one of the same name is replaced.

    Args:
        kind: The kind.

    Returns:
        It.

    Example:
        >>> register_kind(Kind("slow_batch", severity="info")).name
        'slow_batch'
        >>> kind_of("slow_batch").severity
        'info'
    """
    _registered[kind.name] = kind
    return kind


def kind_of(name: str) -> Kind:
    """The registered kind of this name; one with the defaults where there is none.

    Example:
        >>> kind_of("nonfinite").severity, kind_of("made up").severity
        ('error', 'warning')
    """
    return _registered.get(name) or Kind(name)


for _kind in (
    Kind("input", precedence=10, bundled=True, color="#b5458a", dark_color="#e58bc0"),
    Kind("nonfinite", "error", precedence=20, bundled=True, color="#d03801", dark_color="#ff7a45"),
    Kind("spike", bundled=True, color="#c98a00", dark_color="#f2c14e"),
    Kind("rollback", "error", color="#0068a8", dark_color="#58b4f0"),
    Kind("checkpoint_refused", "error", color="#6b4fc4", dark_color="#a995f5"),
    Kind("exception", "error", color="#a3195b", dark_color="#ff8fb8"),
    Kind("loss_scale", "info", color="#4e8a20", dark_color="#98cf62"),
):
    register_kind(_kind)
