"""Reading and writing parameters wherever they live: on a device, in half precision, sharded, or parametrised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["copy_into", "obstacle", "read", "write"]

# As many power iterations as torch makes when it sets spectral normalization up.
_SETTLING_POWER_ITERATIONS = 15


def obstacle(tensors: tuple[Tensor, ...], parametrization: ParametrizationList | None) -> str | None:
    """Return why these tensors, which hold one parameter, cannot or must not be written; None where they can."""
    if not all(tensor.requires_grad for tensor in tensors):
        return "frozen"
    if any(map(is_lazy, tensors)):
        return "lazy, and without a shape until a batch has run through the model"
    if not all(tensor.is_floating_point() for tensor in tensors):
        return "not real-valued"
    if any(tensor.numel() == 0 for tensor in tensors):
        return "empty"
    if parametrization is not None:
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            return "parametrised and sharded"
        for step in parametrization:
            if not hasattr(step, "right_inverse"):
                return f"{type(step).__name__} has no right_inverse"
    return None


def read(tensors: tuple[Tensor, ...], parametrization: ParametrizationList | None) -> Tensor:
    """Return a parameter's values as its layer sees them, whole also where it is sharded."""
    if parametrization is not None:
        with torch.no_grad(), _training(parametrization, False):
            value: Tensor = parametrization()
            return value
    (tensor,) = tensors
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def write(tensors: tuple[Tensor, ...], parametrization: ParametrizationList | None, value: Tensor) -> None:
    """Copy values into a parameter, in place: optimizers and hooks hold references to the tensors."""
    if parametrization is None:
        copy_into(tensors[0], value)
        return
    originals: Any = value.to(tensors[0].device, tensors[0].dtype)
    for step in reversed(list[Any](parametrization)):
        originals = step.right_inverse(originals)
    for tensor, original in zip(tensors, (originals,) if isinstance(originals, Tensor) else originals, strict=True):
        copy_into(tensor, original)
    if any(isinstance(step, parametrizations._SpectralNorm) for step in parametrization):
        _settle_power_iterations(parametrization)


@torch.no_grad()
def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Copy values into a tensor in place; of a sharded one each process copies its own shard."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.dtype)
        # Every process has drawn the same values, so nothing is sent.
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.copy_(value)


def _settle_power_iterations(parametrization: ParametrizationList) -> None:
    """Let spectral normalization find the new weight's largest singular value: its estimate is of the old one."""
    with _training(parametrization, True):
        for _ in range(_SETTLING_POWER_ITERATIONS):
            parametrization()


@contextmanager
def _training(module: nn.Module, mode: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode for a while; each of its modules gets its own mode back."""
    modes = [(each, each.training) for each in module.modules()]
    module.train(mode)
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
