"""Initialization policies: what a model's parameters start as. Pure PyTorch, for any module.

Example:
    >>> import torch
    >>> from stability_callbacks.initialization import Auto
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> report = Auto().apply(model)
    >>> report["0.weight"].what
    'Kaiming normal, fan_in 4, gain 1.41 (before ReLU)'
"""

from stability_callbacks.diagnosis import LossFunction, SignalFinding, SignalReport, SignalRow, signal_report
from stability_callbacks.initialization._auto import Auto
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._following import activation_after
from stability_callbacks.initialization._gain import Activation
from stability_callbacks.initialization._initializers import Initializer, constant
from stability_callbacks.initialization._kernels import Kaiming, Normal, Orthogonal, TruncNormal, Xavier
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role
from stability_callbacks.initialization._lsuv import LSUV
from stability_callbacks.initialization._pattern import ByPattern
from stability_callbacks.initialization._policy import LeaveAlone, Policy
from stability_callbacks.initialization._recurrent import Recurrent
from stability_callbacks.initialization._report import InitReport, InitRow
from stability_callbacks.initialization._residual import DepthScaled, ZeroResidual

__all__ = [
    "LSUV",
    "Activation",
    "Auto",
    "ByPattern",
    "CallGraph",
    "DepthScaled",
    "InitReport",
    "InitRow",
    "Initializer",
    "Kaiming",
    "LayerParameter",
    "LeaveAlone",
    "LossFunction",
    "Normal",
    "Orthogonal",
    "Policy",
    "Recurrent",
    "Role",
    "SignalFinding",
    "SignalReport",
    "SignalRow",
    "TruncNormal",
    "Xavier",
    "ZeroResidual",
    "activation_after",
    "constant",
    "signal_report",
]
