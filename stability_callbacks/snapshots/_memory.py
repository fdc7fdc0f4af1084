"""The memory behind tensors, and copies of it in groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stability_callbacks.gradient_pass import group_by_device_and_dtype, writable_values

__all__ = ["address_of", "copy_in_groups", "is_float", "memory_of"]


def memory_of(tensor: Tensor) -> Tensor:
    """The memory that this process holds of a tensor; what an expanded one repeats is there once.

    Args:
        tensor: Any tensor.

    Returns:
        A dense real view that stays where it is if the tensor is given other memory; a sparse tensor as it is.
    """
    if tensor.layout != torch.strided:
        return tensor
    memory = writable_values(tensor).detach()
    for dim, (size, stride) in enumerate(zip(memory.shape, memory.stride(), strict=True)):
        if stride == 0 and size > 1:
            memory = memory.narrow(dim, 0, 1)
    return memory


def address_of(tensor: Tensor) -> int:
    """Where this process holds a dense tensor; 0 for a sparse one."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def copy_in_groups(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of the same device, in grouped operations.

    Args:
        targets: Tensors to write to.
        sources: Tensors to read from, one for each target and on its device.
    """
    for members in group_by_device_and_dtype(targets).values():
        torch._foreach_copy_([targets[index] for index in members], [sources[index] for index in members])


def is_float(tensor: Tensor) -> bool:
    """Whether the elements can be NaN or infinite."""
    return tensor.is_floating_point() or tensor.is_complex()
