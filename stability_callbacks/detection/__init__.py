"""Detectors: what makes a step bad. Pure PyTorch; each looks at the evidence of one step and votes on the device.

Example:
    >>> import torch
    >>> from stability_callbacks.detection import NonFinite, StepEvidence
    >>> from stability_callbacks.gradient_pass import measure_gradients
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([1.0, float("inf")])
    >>> bool(NonFinite()(StepEvidence(loss=torch.tensor(0.5), gradients=measure_gradients([weight]))))
    True
"""

from stability_callbacks.detection._detector import Detector, StepEvidence
from stability_callbacks.detection._input_range import InputRange, input_magnitude
from stability_callbacks.detection._loss_level import LossLevel
from stability_callbacks.detection._nonfinite import NonFinite
from stability_callbacks.detection._spike import Spike
from stability_callbacks.detection._sustained import SustainedRise

__all__ = [
    "Detector",
    "InputRange",
    "LossLevel",
    "NonFinite",
    "Spike",
    "StepEvidence",
    "SustainedRise",
    "input_magnitude",
]
