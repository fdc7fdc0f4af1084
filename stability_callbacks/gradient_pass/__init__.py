"""One measurement of the gradients per optimizer step, shared by everyone who needs it.

Monitors, detectors and clip rules all ask the same question, "how large are the gradients?". Asked once, by grouped
operations and without waiting for the device, the answer costs about as much as the total norm alone; the total, the
per-layer norms and the check for NaN and infinity are derived from it.
"""

from __future__ import annotations

from stability_callbacks.gradient_pass._names import (
    NamedParameters,
    Parameters,
    layer_of,
    named_gradients,
    named_parameters,
)
from stability_callbacks.gradient_pass._norms import add_partial_sums, combine_norms, group_norms, tensor_norms
from stability_callbacks.gradient_pass._pass import GradientNorms, GradientPass, measure_gradients
from stability_callbacks.gradient_pass._scaling import scale_each_gradient_, scale_gradients_
from stability_callbacks.gradient_pass._views import group_by_device_and_dtype, local_values, writable_values

__all__ = [
    "GradientNorms",
    "GradientPass",
    "NamedParameters",
    "Parameters",
    "add_partial_sums",
    "combine_norms",
    "group_by_device_and_dtype",
    "group_norms",
    "layer_of",
    "local_values",
    "measure_gradients",
    "named_gradients",
    "named_parameters",
    "scale_each_gradient_",
    "scale_gradients_",
    "tensor_norms",
    "writable_values",
]
