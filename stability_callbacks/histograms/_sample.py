"""The elements that a histogram is made of: local, flat, and not too many."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class Sample(NamedTuple):
    """What is to be counted of one tensor on this process.

    Attributes:
        elements: All elements that this process holds, flat.
        values: The sampled ones, real, at least one: NaN stands for none.
        size: Upper bound of ``len(values)``, the same on all processes.
        groups: The process groups whose members hold the other shards.
    """

    elements: Tensor
    values: Tensor
    size: int
    groups: tuple[ProcessGroup, ...]


def draw_sample(tensor: Tensor, max_elements: int) -> Sample:
    """Return every ``k``-th element of a tensor, ``k`` as small as ``max_elements`` allows.

    Args:
        tensor: Any tensor. Of a sparse one the stored values count, of a complex one the absolute values, of a
            ``DTensor`` the local shard.
        max_elements: Upper bound of the number of elements.

    Returns:
        The sample; its ``values`` are a view where the tensor's memory layout and type allow it.
    """
    groups: tuple[ProcessGroup, ...] = ()
    stride = sampling_stride(tensor.numel(), max_elements)
    size = -(-tensor.numel() // stride)
    if is_dtensor(tensor):
        tensor, groups = _local_shard(tensor)
    elif tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
        stride = sampling_stride(tensor.numel(), max_elements)
        size = -(-tensor.numel() // stride)
    elements = _flatten(tensor)
    return Sample(elements, _real(elements[::stride]), max(size, 1), groups)


def sampling_stride(numel: int, max_elements: int) -> int:
    """Return the smallest stride that leaves at most ``max_elements`` and shares no factor with ``numel``.

    A stride of 16 would see only every 16th column of a 1024 x 1024 matrix, all rows alike. One without a common
    factor meets every row and every column.

    Example:
        >>> sampling_stride(1024 * 1024, 65_536), sampling_stride(1000, 65_536)
        (17, 1)
    """
    stride = max(1, -(-numel // max_elements))
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``, found out without the second that importing the class takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _local_shard(tensor: DTensor) -> tuple[Tensor, tuple[ProcessGroup, ...]]:
    """Return the local elements, and the groups over which shards add up to the whole tensor."""
    from torch.distributed.tensor import Replicate

    if any(placement.is_partial() for placement in tensor.placements):
        tensor = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
    mesh = tensor.device_mesh
    sharded = (dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tensor.to_local(), tuple(mesh.get_group(dim) for dim in sharded)


def _flatten(tensor: Tensor) -> Tensor:
    """Return the elements in the order of memory: without a copy, unless there are gaps between them."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).reshape(-1)


def _real(values: Tensor) -> Tensor:
    if values.is_complex():
        # In double precision, because the absolute value of a finite element may overflow its own type.
        values = values.to(torch.complex128).abs()
    elif not values.is_floating_point():
        values = values.float()
    # The type stays the same for an empty shard: processes sort samples by type, and must do it alike.
    return values if values.numel() > 0 else values.new_full((1,), math.nan)
