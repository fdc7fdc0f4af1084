"""What happened, when and where, and what was done about it: one line of JSON for each incident."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stability_callbacks._atomic import fsync
from stability_callbacks.diagnosis._cures import NO_CURE, cure_of, is_backward, meaning_of
from stability_callbacks.diagnosis._finding import Finding
from stability_callbacks.diagnosis._kinds import Wording, kind_of

__all__ = ["Incident", "IncidentLog", "read_incidents"]

_PHASES = ("input", "parameter", "buffer", "forward", "loss", "backward")  # of a Cause
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_COUNTERS = ("step", "epoch", "batch_idx", "rank")
_TEXTS = ("kind", "action", "time")
_OPTIONAL_TEXTS = ("module", "operation", "source", "bundle", "optimizer")
_LONGEST_QUOTE = 60


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass
class Incident:
    """Something that went wrong in training, or was kept from it.

    In JSON it is one object with these attributes as keys; those that are None are left out. JSON has no numbers that
    are not finite: in ``evidence`` they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``. Readers leave out keys
    that they do not know, which newer versions may write.

    Attributes:
        step: Step of the trainer, as on the metrics' x-axis.
        epoch: Epoch, from 0.
        batch_idx: Batch in the epoch, from 0; the last one of the step under gradient accumulation.
        rank: The process that reports it; 0 where there is one.
        kind: ``"nonfinite"``, ``"spike"``, ``"input"``, ``"rollback"``, ``"checkpoint_refused"``, ``"loss_scale"``, or
            the kind of a detector of your own.
        evidence: Named numbers and texts that led to it, such as ``{"loss": nan, "grad_norm": 3.1e12}``.
        action: What was done, such as ``"skipped"``.
        module: Full name of the module in which it began, where known.
        operation: The operation in which it began, such as ``"aten.log.default"``, where known.
        source: File and line of that operation, where known.
        bundle: The directory with what is needed to reproduce it, relative to that of the log, where there is one.
        optimizer: The optimizer's name in metrics, where one is concerned.
        time: Coordinated universal time, ISO 8601. Default: now.

    Example:
        >>> incident = Incident(
        ...     7, 0, 7, 0, "nonfinite", {"loss": math.inf}, "skipped", time="2026-01-01T00:00:00+00:00"
        ... )
        >>> incident.to_json()  # doctest: +NORMALIZE_WHITESPACE
        '{"step": 7, "epoch": 0, "batch_idx": 7, "rank": 0, "kind": "nonfinite", "evidence": {"loss": "inf"},
          "action": "skipped", "time": "2026-01-01T00:00:00+00:00"}'
        >>> Incident.from_json(incident.to_json()) == incident
        True
    """

    step: int
    epoch: int
    batch_idx: int
    rank: int
    kind: str
    evidence: dict[str, float | str]
    action: str
    module: str | None = None
    operation: str | None = None
    source: str | None = None
    bundle: str | None = None
    optimizer: str | None = None
    time: str = field(default_factory=_now)

    def to_json(self, indent: int | None = None) -> str:
        """The incident as strict JSON, in ASCII; on one line unless indented.

        Raises:
            TypeError: If something in it is neither a number nor a string.
        """
        values = {key: value for key, value in asdict(self).items() if value is not None}
        values["evidence"] = {name: _encode(value) for name, value in self.evidence.items()}
        return json.dumps(values, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Incident:
        """The incident that a JSON object describes.

        Raises:
            ValueError: If the text is not JSON, or not that of an incident: a key is missing, or a value has another
                type than its attribute. Integers must fit into 64 bits, and numbers in ``evidence`` into a float.
        """
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply for an incident") from error
        if not isinstance(values, Mapping) or not isinstance(values.get("evidence"), Mapping):
            raise ValueError("this is not the JSON object of an incident")
        required = [each.name for each in fields(cls) if each.default is each.default_factory is MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"the incident has no {', '.join(missing)}")
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        _check_types(known)
        evidence = {name: _decode(value) for name, value in values["evidence"].items()}
        return cls(**{**known, "evidence": evidence})

    @property
    def phase(self) -> str:
        """Where in the step it began, as in ``Cause.phase``; ``"unknown"`` where the record does not tell."""
        if (phase := self.evidence.get("phase")) in _PHASES:
            return str(phase)
        if self.operation is None:
            return "unknown"
        return "backward" if is_backward(self.operation) else "forward"

    @property
    def reason(self) -> str | None:
        """Why the operation broke, as in ``Cause.reason``; None where the record does not tell."""
        return str(found) if (found := self.evidence.get("reason")) else None

    def wording(self, phase: str | None = None, last: int | None = None, reason: str | None = None) -> Wording:
        """What it is called, what it means, and what to change, in the words of its registered kind.

        Args:
            phase: Where in the step it began, if that is known better than from the record. Default: ``phase``.
            last: The last step of several such incidents of which this is the first. Default: this one's.
            reason: Why the operation broke, if that is known better than from the record. Default: ``reason``.

        Returns:
            The words, with the operation, the place and the steps in them.
        """
        reason = self.reason if reason is None else reason
        facts = {
            "operation": self.operation or "an operation",
            "where": _where(self.module),
            "at": f", at `{self.source.replace('`', '')}`" if self.source else "",
            "cure": cure_of(self.operation, reason) or NO_CURE,
            "reason": meaning_of(reason),
            "first": f"{self.step:,}",
            "last": f"{self.step if last is None else last:,}",
        }
        return kind_of(self.kind).wording(self.phase if phase is None else phase).filled(facts)

    def finding(self) -> Finding:
        """It as a finding: as grave as its registered kind, with the cause that was found and the first remedy.

        Example:
            >>> incident = Incident(7, 0, 7, 0, "nonfinite", {"loss": math.nan}, "skipped", "head", "log")
            >>> print(incident.finding())  # doctest: +NORMALIZE_WHITESPACE
            nonfinite in head: loss nan. Cause: log. Remedy: Use `stability_callbacks.numerics.safe_log`. For
            probabilities use `log_softmax` or `logsigmoid`.
        """
        causes = self._causes()
        evidence = {name: value for name, value in self.evidence.items() if name != "cause" or not causes}
        remedy = self.wording().remedies[0]
        return Finding(self.kind, kind_of(self.kind).severity, self.module or "", evidence, causes, remedy)

    def _causes(self) -> tuple[str, ...]:
        if self.evidence.get("phase") == "":  # the search says why it found none
            return ()
        if explanation := self.evidence.get("cause"):
            return (str(explanation),)
        origin = ", at ".join(filter(None, (self.operation, self.source)))
        return (origin,) if origin else ()


class IncidentLog:
    """A file of incidents, one JSON object a line, that survives the process at every moment.

    Each line is written at once and is on the disk before :meth:`append` returns. Several processes may append to one
    file. A line that a killed process left incomplete is ended, so that it corrupts no other; readers leave it out.

    Args:
        path: The file, by convention ``incidents.jsonl``. It and its directories are made by the first incident.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     log = IncidentLog(Path(directory, "incidents.jsonl"))
        ...     log.append(Incident(7, 0, 7, 0, "spike", {"loss": 80.0}, "skipped"))
        ...     [incident.kind for incident in read_incidents(log.path)]
        ['spike']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def append(self, incident: Incident) -> None:
        """Add an incident.

        Raises:
            OSError: If the file can't be written.
            TypeError: If the incident holds something that is neither a number nor a string.
        """
        line = incident.to_json().encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:  # unbuffered: the line goes out in one call
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        if not size:
            fsync(self.path.parent)


def read_incidents(path: str | os.PathLike[str]) -> list[Incident]:
    """Read a file of incidents; with a warning, lines that are incomplete or damaged are left out.

    Args:
        path: The file that an :class:`IncidentLog` wrote.

    Returns:
        The incidents, in the order written.

    Raises:
        FileNotFoundError: If there is no such file, as in a run without incidents.
    """
    incidents = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            incidents.append(Incident.from_json(line.decode()))
        except ValueError as error:
            warnings.warn(
                f"{path}, line {number} is left out: it was not written completely, or was damaged ({error})",
                stacklevel=2,
            )
    return incidents


def _where(module: str | None) -> str:
    if module is None:
        return "somewhere in the model"
    return f"in module `{module}`" if module else "in the model itself, outside of its submodules,"


def _check_types(values: Mapping[str, Any]) -> None:
    """Raise a ValueError at the first value that is not of its attribute's type."""
    for name, value in values.items():
        if name in _COUNTERS:
            _check(type(value) is int and -(2**63) <= value < 2**63, name, "an integer of at most 64 bits", value)
        elif name in _TEXTS:
            _check(isinstance(value, str), name, "a string", value)
        elif name in _OPTIONAL_TEXTS:
            _check(value is None or isinstance(value, str), name, "a string or null", value)
    for name, value in values["evidence"].items():
        _check(isinstance(value, str) or _is_number(value), f"evidence[{name!r}]", "a number or a string", value)


def _check(valid: bool, name: str, allowed: str, value: Any) -> None:
    if not valid:
        quote = json.dumps(value)
        shown = quote if len(quote) <= _LONGEST_QUOTE else f"{quote[:_LONGEST_QUOTE]}..."
        raise ValueError(f"{name} must be {allowed}, got {shown}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < sys.float_info.max)


def _encode(value: float | str) -> float | str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _decode(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
