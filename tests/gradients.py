"""Parameters with given gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def parameter(gradient: Any) -> nn.Parameter:
    """A parameter with a given gradient."""
    gradient = torch.as_tensor(gradient)
    result = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device))
    result.grad = gradient
    return result


def gradient(weight: Tensor) -> Tensor:
    """A parameter's gradient, which it must have."""
    assert weight.grad is not None
    return weight.grad


def sparse_embedding(tokens: tuple[int, ...] = (1, 3, 1)) -> nn.Embedding:
    """An embedding with a sparse, uncoalesced gradient: by default row 1 is there twice."""
    layer = nn.Embedding(5, 2, sparse=True)
    scale = torch.arange(1.0, len(tokens) + 1)
    (layer(torch.tensor(tokens, dtype=torch.long)).sum(1) * scale).sum().backward()
    return layer


def conjugated_parameter() -> nn.Parameter:
    """A complex parameter whose gradient's conjugation is only noted, as autograd leaves it sometimes."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    (weight.conj() * torch.tensor([3 + 4j, 0.5 - 2j]).conj()).real.sum().backward()
    assert gradient(weight).is_conj()
    return weight
