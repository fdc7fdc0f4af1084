"""What happened and why: incidents and findings, causes of non-finite values, the signal's way through a model.

Pure PyTorch.
"""

from __future__ import annotations

from stability_callbacks.diagnosis import _builtin_kinds as _builtin_kinds  # registers them
from stability_callbacks.diagnosis._bundle import Bundle, BundleError, read_bundle, write_bundle
from stability_callbacks.diagnosis._cause import Cause, find_cause
from stability_callbacks.diagnosis._copied import can_run_in_fork, run_on_copy
from stability_callbacks.diagnosis._cures import cure_of
from stability_callbacks.diagnosis._finding import Finding, Severity
from stability_callbacks.diagnosis._forked import Failure, run_in_fork
from stability_callbacks.diagnosis._history import StepHistory
from stability_callbacks.diagnosis._history_csv import StepRow, read_history, write_history
from stability_callbacks.diagnosis._history_plot import plot_history
from stability_callbacks.diagnosis._incident import Incident, IncidentLog, read_incidents
from stability_callbacks.diagnosis._isolation import RandomState, isolated
from stability_callbacks.diagnosis._kinds import KINDS, Kind, Wording, kind_of, register_kind
from stability_callbacks.diagnosis._numeric_errors import numeric_fault, raising_line
from stability_callbacks.diagnosis._retention import bundles, make_room, tensor_bytes
from stability_callbacks.diagnosis._signal import LossFunction, signal_report
from stability_callbacks.diagnosis._signal_report import SignalFinding, SignalReport, SignalRow
from stability_callbacks.diagnosis._storable import Unsaved
from stability_callbacks.diagnosis._update_arithmetic import describe_settings, vanishing_eps

__all__ = [
    "KINDS",
    "Bundle",
    "BundleError",
    "Cause",
    "Failure",
    "Finding",
    "Incident",
    "IncidentLog",
    "Kind",
    "LossFunction",
    "RandomState",
    "Severity",
    "SignalFinding",
    "SignalReport",
    "SignalRow",
    "StepHistory",
    "StepRow",
    "Unsaved",
    "Wording",
    "bundles",
    "can_run_in_fork",
    "cure_of",
    "describe_settings",
    "find_cause",
    "isolated",
    "kind_of",
    "make_room",
    "numeric_fault",
    "plot_history",
    "raising_line",
    "read_bundle",
    "read_history",
    "read_incidents",
    "register_kind",
    "run_in_fork",
    "run_on_copy",
    "signal_report",
    "tensor_bytes",
    "vanishing_eps",
    "write_bundle",
    "write_history",
]
