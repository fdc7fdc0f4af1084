"""Faults to rehearse with: what goes wrong, in which steps and where, and how it is put into tensors. Pure PyTorch.

Example:
    >>> import torch
    >>> from stability_callbacks.faults import Fault, draw_spot, named_tensors
    >>> fault = Fault("input", "inf", steps=range(100, 200), where="image")
    >>> batch = {"image": torch.zeros(2), "label": torch.zeros(2)}
    >>> if fault.is_due(step=150):
    ...     spot = draw_spot(fault, 150, named_tensors(batch, "batch"))
    ...     undo = spot.corrupt_(fault.factor)
    >>> spot.name, float(batch["image"].max())
    ("batch['image']", inf)
    >>> undo()
    >>> batch["image"]
    tensor([0., 0.])
"""

from stability_callbacks._nesting import named_tensors
from stability_callbacks.faults._fault import Fault, Injection
from stability_callbacks.faults._output_trap import OutputTrap
from stability_callbacks.faults._spot import Spot, draw_spot
from stability_callbacks.faults._targets import GradientMarks, named_optimizer_state

__all__ = [
    "Fault",
    "GradientMarks",
    "Injection",
    "OutputTrap",
    "Spot",
    "draw_spot",
    "named_optimizer_state",
    "named_tensors",
]
