"""Views of tensors of any kind, sparse, sharded and complex ones too, as dense ones to read from or to write to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["group_by_device_and_dtype", "local_values", "writable_values"]


def local_values(tensor: Tensor) -> Tensor:
    """The numbers that this process holds of a tensor, as a dense tensor to read from.

    Sparse tensors give their coalesced values, sharded tensors (``DTensor``) the local shard.

    Args:
        tensor: Any tensor.

    Returns:
        A dense tensor: the tensor itself or a view of it, except where a sparse one had to be coalesced.
    """
    values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if values.layout != torch.strided:
        values = (values.coalesce() if values.layout == torch.sparse_coo else values).values()
    return values


def writable_values(tensor: Tensor) -> Tensor:
    """The real numbers that this process keeps in memory for a tensor, as a dense tensor to write to in place.

    For operations that treat each number alike and a number as its negative, such as scaling and clamping: a complex
    tensor gives its real and imaginary parts, and those of a lazily conjugated one lie there unconjugated. A sparse
    tensor gives its values as they are stored, coalesced or not.

    Args:
        tensor: Any tensor.

    Returns:
        A dense real view; complex ones get a last dimension of size 2.
    """
    values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if values.layout != torch.strided:
        values = values._values() if values.layout == torch.sparse_coo else values.values()
    if not values.is_complex():
        return values
    return torch.view_as_real(values.conj() if values.is_conj() else values)


def group_by_device_and_dtype(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Sort tensors into the groups that one grouped operation can take.

    Args:
        tensors: Tensors.

    Returns:
        The positions of the tensors of each device and dtype.

    Example:
        >>> groups = group_by_device_and_dtype([torch.zeros(1), torch.zeros(1).half(), torch.ones(2)])
        >>> list(groups.values())
        [[0, 2], [1]]
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    return groups
