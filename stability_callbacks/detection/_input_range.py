"""The detector of inputs that are not finite or far too large."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks._nesting import named_tensors
from stability_callbacks._validation import check_number
from stability_callbacks.detection._detector import Detector, StepEvidence
from stability_callbacks.gradient_pass import combine_norms, local_values, tensor_norms

__all__ = ["InputRange", "input_magnitude"]


class InputRange(Detector):
    r"""Votes against a step whose inputs hold NaN or infinity, or a value of too large a magnitude.

    Use it where a normalization layer stands near the input: it hides a batch that was scaled by mistake from the
    loss and from the gradients, while its running statistics take that batch in. No other detector sees it.

    .. math:: \max_i |x_i| > \text{max\_abs}

    A step without a floating-point input, such as one of token indices only, always passes. Targets are part of a
    batch, so they are looked at too.

    Args:
        max_abs: Largest magnitude allowed, > 0; several times that of ordinary inputs, so about 50 for standardized
            ones. Default None: any finite value will do.

    Raises:
        TypeError: If ``max_abs`` is not a number.
        ValueError: If ``max_abs`` is not positive.

    Example:
        >>> from stability_callbacks.gradient_pass import measure_gradients
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.ones(1)
        >>> batch = {"image": torch.tensor([0.5, -2e4]), "label": torch.tensor([1])}
        >>> evidence = StepEvidence(None, measure_gradients([weight]), input_magnitude=input_magnitude(batch))
        >>> InputRange(max_abs=50)(evidence)
        tensor(True)
    """

    kind: ClassVar[str] = "input"
    needs_inputs: ClassVar[bool] = True

    def __init__(self, max_abs: float | None = None) -> None:
        self.max_abs = None if max_abs is None else check_number("max_abs", max_abs, above=0)

    def __call__(self, evidence: StepEvidence) -> Tensor:
        device = evidence.gradients.total.device
        magnitude = evidence.input_magnitude
        if magnitude is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        bad = ~torch.isfinite(magnitude)
        if self.max_abs is not None:
            bad = bad | (magnitude > self.max_abs)
        return bad.to(device)


def input_magnitude(batch: Any) -> Tensor | None:
    """The largest absolute value in a batch, by grouped operations and without waiting for the device.

    Use it to feed :class:`InputRange` in a hand-written loop. For the micro-batches of one step combine the results
    with ``torch.maximum``, which keeps a NaN.

    Args:
        batch: Tensors in any nesting of mappings, sequences, dataclasses and objects that can be read as mappings, such
            as the graphs of PyTorch Geometric. Floating-point and complex tensors count, of any shape and layout; of a
            sharded one (``DTensor``) the local shard. Everything else is passed over.

    Returns:
        0-dim, on the first tensor's device, float32 (float64 if a tensor is): NaN if a value is NaN, 0 if all tensors
        are empty. None if there is no floating-point or complex tensor.

    Example:
        >>> input_magnitude([torch.tensor([1.0, -3.0]), {"token": torch.tensor([7])}])
        tensor(3.)
    """
    tensors = [tensor for _, tensor in named_tensors(batch, "batch")]
    values = [local_values(tensor) for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    return combine_norms(tensor_norms(values, math.inf), math.inf) if values else None
