"""How activations and gradients go through a network, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stability_callbacks.diagnosis._finding import Finding
from stability_callbacks.diagnosis._kinds import kind_of
from stability_callbacks.diagnosis._signal_kinds import (
    DEAD,
    DETACHED,
    EXPLODING_FORWARD,
    NON_FINITE,
    REMEDIES,
    VANISHING_FORWARD,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SignalFinding", "SignalReport", "SignalRow"]

_HEADINGS = ("layer", "mean", "std", "signal", "dL/dy", "dL/dw", "dw/w", "flags")


class SignalRow(NamedTuple):
    """What went through one layer: a module that owns parameters. Numbers that do not exist are NaN.

    Attributes:
        name: The layer's full name, without the segments that wrappers such as ``torch.compile`` add; empty for the
            model itself.
        calls: How often it was called. 0 where another module uses its parameters, as multi-head attention does.
        activation_mean: Mean of its output over all elements and calls; of a tuple, the first floating-point tensor.
        activation_std: Standard deviation of its output, likewise.
        signal_std: The part of it that depends on the sample: root of the variance over the first dimension, averaged
            over the others. Biases and positions do not add to it. The same as ``activation_std`` where the first
            dimension has size 1.
        output_grad_norm: Norm of the gradient of the loss with respect to its output, over all calls.
        grad_norm: Norm of the gradient with respect to its parameters.
        weight_norm: Norm of the parameters that have this gradient; of all, where none is trainable.
        flags: What is wrong, or worth a remark.
    """

    name: str
    calls: int
    activation_mean: float
    activation_std: float
    signal_std: float
    output_grad_norm: float
    grad_norm: float
    weight_norm: float
    flags: tuple[str, ...] = ()

    @property
    def grad_to_weight(self) -> float:
        """Gradient norm over weight norm; NaN where the weights are zero."""
        return self.grad_norm / self.weight_norm if self.weight_norm else math.nan

    @property
    def faults(self) -> tuple[str, ...]:
        """Those of the flags that are faults: not ``unused``, ``frozen`` and ``silent by zero initialisation``."""
        return tuple(flag for flag in self.flags if flag in REMEDIES)


@dataclass(frozen=True)
class SignalFinding(Finding):
    """One kind of fault: a :class:`Finding` with the layers concerned.

    Attributes:
        kind: Which.
        severity: ``"error"`` for ``"non-finite"`` and ``"dead"``, else ``"warning"``.
        where: The first of the layers; empty where that is the model itself.
        evidence: The numbers that show it, and the layers that they are of: ``first_layer`` and ``loss``;
            ``gradient_or_signal``; ``layers``, their number; ``activation_std`` and ``layer``; or ``lowest``,
            ``lowest_layer``, ``highest`` and ``highest_layer`` of the standard deviation over the batch or the norm of
            the output's gradient.
        causes: Empty.
        remedy: What to do.
        layers: The layers concerned, in order of execution.
    """

    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        first, last = _shown(self.layers[0]), _shown(self.layers[-1])
        where = f"layer {first}" if len(self.layers) == 1 else f"{len(self.layers)} layers, {first} to {last}"
        return f"{self.kind} ({where}): {_evidence_in_words(self)}. Remedy: {self.remedy}."


@dataclass(frozen=True)
class SignalReport:
    """How the signal goes through a network, one row per layer in order of execution.

    ``str(report)`` is a plain table, and ``rich.print(report)`` a coloured one: mean, std and signal of each layer's
    output ``y``, the norms of the gradients with respect to ``y`` and to its parameters ``w``, the latter over the norm
    of ``w`` (``dw/w``), and flags.

    Attributes:
        rows: What went through each layer. One that was not called follows the one it was registered after.
        loss: The loss of the batch.

    Example:
        >>> import torch
        >>> from stability_callbacks.diagnosis import signal_report
        >>> from stability_callbacks.initialization import Normal
        >>> _ = torch.manual_seed(0)
        >>> layers = [layer for _ in range(20) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
        >>> model = torch.nn.Sequential(*layers)
        >>> _ = Normal(std=0.3).apply(model)
        >>> report = signal_report(model, torch.randn(32, 64))
        >>> report.verdict
        'exploding forward, exploding backward'
        >>> [finding.kind for finding in report.findings]
        ['exploding forward', 'exploding backward']
    """

    rows: tuple[SignalRow, ...]
    loss: float

    def __iter__(self) -> Iterator[SignalRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> SignalRow:
        """Return the row of the layer with this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def findings(self) -> tuple[SignalFinding, ...]:
        """The faults, gravest first."""
        flagged = {kind: [row for row in self.rows if kind in row.flags] for kind in REMEDIES}
        return tuple(
            SignalFinding(
                kind=kind,
                severity=kind_of(kind).severity,
                where=rows[0].name,
                evidence=_evidence(self, kind, rows),
                remedy=REMEDIES[kind],
                layers=tuple(row.name for row in rows),
            )
            for kind, rows in flagged.items()
            if rows
        )

    @property
    def verdict(self) -> str:
        """The kinds of faults, gravest first, separated by commas; ``healthy`` where there is none."""
        return ", ".join(finding.kind for finding in self.findings) or "healthy"

    def __str__(self) -> str:
        lines = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join(["  ".join(line).rstrip() for line in padded] + [f"verdict: {self.verdict}"])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Signal at initialisation: {self.verdict}")
        table.add_column(_HEADINGS[0], overflow="fold")
        for heading in _HEADINGS[1:-1]:
            table.add_column(heading, no_wrap=True, justify="right")
        table.add_column(_HEADINGS[-1], min_width=len("initialisation"))
        for row in self.rows:
            style = "red" if row.faults else "dim" if row.flags else None
            table.add_row(*map(Text, _cells(row)), style=style)
        return table


def _cells(row: SignalRow) -> tuple[str, ...]:
    numbers = (
        row.activation_mean,
        row.activation_std,
        row.signal_std,
        row.output_grad_norm,
        row.grad_norm,
        row.grad_to_weight,
    )
    return (_shown(row.name), *(f"{number:.2g}" for number in numbers), ", ".join(row.flags))


def _evidence(report: SignalReport, kind: str, rows: list[SignalRow]) -> dict[str, float | str]:
    if kind == NON_FINITE:
        return {"first_layer": rows[0].name, "loss": report.loss}
    if kind == DETACHED:
        return {"layers": float(len(rows))}
    if kind == DEAD:
        return {"gradient_or_signal": 0.0}
    if kind == EXPLODING_FORWARD:
        worst = max(rows, key=lambda row: row.activation_std)
        return {"activation_std": worst.activation_std, "layer": worst.name}
    attribute = "signal_std" if kind == VANISHING_FORWARD else "output_grad_norm"
    finite = [row for row in report.rows if math.isfinite(getattr(row, attribute))]
    low, high = (choose(finite, key=lambda row: getattr(row, attribute)) for choose in (min, max))
    return {
        "lowest": getattr(low, attribute),
        "lowest_layer": low.name,
        "highest": getattr(high, attribute),
        "highest_layer": high.name,
    }


def _evidence_in_words(finding: SignalFinding) -> str:
    def fact(number: str, layer: str) -> str:
        return f"{finding.evidence[number]:.2g} in layer {_shown(str(finding.evidence[layer]))}"

    if finding.kind == NON_FINITE:
        layer = _shown(str(finding.evidence["first_layer"]))
        return f"first in layer {layer}, loss {finding.evidence['loss']:.2g}"
    if finding.kind == DETACHED:
        return "the loss depends on them, but its graph does not"
    if finding.kind == DEAD:
        return "gradient or signal exactly 0"
    if finding.kind == EXPLODING_FORWARD:
        return f"activation std {fact('activation_std', 'layer')}"
    what = "std over the batch" if finding.kind == VANISHING_FORWARD else "norm of the output's gradient"
    return f"{what} {fact('lowest', 'lowest_layer')}, {fact('highest', 'highest_layer')}"


def _shown(name: str) -> str:
    return name or "(model)"
