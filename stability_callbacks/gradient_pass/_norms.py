"""Norms of tensors, by grouped operations, and by one collective where they are sharded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from stability_callbacks.gradient_pass._names import layer_of
from stability_callbacks.gradient_pass._views import group_by_device_and_dtype, local_values

__all__ = ["add_partial_sums", "combine_norms", "group_norms", "tensor_norms"]


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    r"""Norm of each tensor, by grouped operations and without waiting for the device.

    .. math:: \lVert t \rVert_p = \big( \sum_i |t_i|^p \big)^{1/p}

    Half-precision tensors are accumulated in float32, so that fp16 values do not overflow. Empty tensors and empty
    shards have norm 0. Sharded tensors give the norm of the whole tensor, at the price of one collective for all of
    them, and of one more for each that is a partial sum; every rank of their mesh must reach these.

    Args:
        tensors: ``P`` tensors of any shape, dtype, layout and device.
        norm_type: The ``p`` of the norm: a positive number or ``inf``.

    Returns:
        Shape ``[P]``, on the first tensor's device, float32 (float64 if a tensor is).

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        tensor([5., 0.])
    """
    if not tensors:
        return torch.zeros(0)
    tensors = [add_partial_sums(tensor) for tensor in tensors]
    values = [local_values(tensor) for tensor in tensors]
    groups = group_by_device_and_dtype(values)
    double = any(dtype in (torch.float64, torch.complex128) for _, dtype in groups)
    dtype = torch.float64 if double else torch.float32
    device = values[0].device
    norms = [torch.zeros((), dtype=dtype, device=device)] * len(values)
    for members in groups.values():
        filled = [index for index in members if values[index].numel()]
        group_norms = _norms_of_group([values[index] for index in filled], norm_type, dtype)
        for index, norm in zip(filled, group_norms, strict=True):
            norms[index] = norm if norm.device == device else norm.to(device)
    return torch.stack(_reduce_over_shards(norms, tensors, norm_type))


def combine_norms(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """Norm of the concatenation of tensors whose norms are given: 0 for none.

    Args:
        norms: Shape ``[P]``.
        norm_type: The ``p`` of the norm.

    Returns:
        0-dim.
    """
    return torch.linalg.vector_norm(norms, norm_type) if norms.numel() else norms.new_zeros(())


def group_norms(
    names: Sequence[str], norms: Tensor, norm_type: float = 2.0, group_of: Callable[[str], str] = layer_of
) -> tuple[list[str], Tensor]:
    """Derive the norms of groups of tensors, such as layers, from the norms of the tensors.

    Args:
        names: The tensors' names.
        norms: Their norms, shape ``[P]``.
        norm_type: The ``p`` of the norm.
        group_of: The name of a tensor's group.

    Returns:
        The ``G`` groups' names in order of appearance, and their norms, shape ``[G]``.

    Example:
        >>> group_norms(["net.0.weight", "net.0.bias", "scale"], torch.tensor([3.0, 4.0, 1.0]))
        (['net.0', 'scale'], tensor([5., 1.]))
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        groups[group_of(name)].append(index)
    return list(groups), tensor_norms([_pick(norms, members) for members in groups.values()], norm_type)


def add_partial_sums(tensor: Tensor) -> Tensor:
    """A sharded tensor whose value is spread over its mesh as terms of a sum, summed; any other tensor as it is.

    Such gradients occur under tensor parallelism. Neither their norm nor their elements can be told from the terms.

    Args:
        tensor: Any tensor.

    Returns:
        The tensor, without partial placements; at the price of a collective if it had one.
    """
    if not isinstance(tensor, DTensor) or not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    return tensor.redistribute(
        placements=[Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    )


def _pick(values: Tensor, indices: Sequence[int]) -> Tensor:
    """Some of a 1-dim tensor's elements, given in rising order, without sending the indices to its device."""
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return values[first : last + 1]
    return torch.stack([values[index] for index in indices])


def _norms_of_group(values: list[Tensor], norm_type: float, dtype: torch.dtype) -> Sequence[Tensor]:
    """Norms, computed in at least a given precision, of dense tensors of one device and dtype with elements in them."""
    if not values:
        return ()
    if values[0].dtype.itemsize == 1:  # float8 has no arithmetic
        values = [value.to(dtype) for value in values]
    device, own = values[0].device, values[0].dtype
    working = dtype.to_complex() if own.is_complex else dtype
    cast = None if own == working else working
    if device.type != "cpu":
        return torch._foreach_norm(values, norm_type, dtype=cast)
    # On the CPU the grouped kernel is a slower loop than this one (torch 2.13: 3x).
    if norm_type == math.inf and not own.is_complex:
        return [_maximum_norm(value).to(dtype) for value in values]
    return [torch.linalg.vector_norm(value, norm_type, dtype=cast) for value in values]


def _maximum_norm(values: Tensor) -> Tensor:
    """Largest magnitude of a real tensor's elements; by the extremes if it is large, which is 20x faster on the CPU."""
    if values.numel() >= 1024:
        low, high = torch.aminmax(values)
        return torch.maximum(low.abs(), high.abs())
    norm: Tensor = torch.linalg.vector_norm(values, math.inf)
    return norm


def _reduce_over_shards(norms: list[Tensor], tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """Turn the norms of local shards into the norms of the whole tensors: one collective for each sharded mesh axis."""
    groups: dict[tuple[DeviceMesh, tuple[Placement, ...]], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            groups[tensor.device_mesh, tensor.placements].append(index)
    for (mesh, placements), indices in groups.items():
        axes = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        if axes:
            local = torch.stack([norms[index] for index in indices])
            whole = _reduce_over_axes(local.to(mesh.device_type), mesh, axes, norm_type).to(local.device)
            for index, norm in zip(indices, whole.unbind(), strict=True):
                norms[index] = norm
    return norms


def _reduce_over_axes(norms: Tensor, mesh: DeviceMesh, axes: Sequence[int], norm_type: float) -> Tensor:
    infinite = norm_type == math.inf
    # A maximum may drop a NaN, depending on the backend and the rank. Powers need float64: the square of a float32
    # norm overflows above 1.8e19.
    part = torch.where(norms.isnan(), math.inf, norms) if infinite else norms.double() ** norm_type
    operation = ReduceOp.MAX if infinite else ReduceOp.SUM
    for axis in axes:
        all_reduce(part, operation, group=mesh.get_group(axis))
    return part if infinite else (part ** (1 / norm_type)).to(norms.dtype)
