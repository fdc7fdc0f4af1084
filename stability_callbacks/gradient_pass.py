"""One measurement of the gradients per optimizer step, shared by everyone who needs it.

Monitors, detectors and clip rules all ask the same question, "how large are the gradients?". Asked once, by grouped
operations and without waiting for the device, the answer costs about as much as the total norm alone; the total, the
per-layer norms and the check for NaN and infinity are derived from it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from stability_callbacks._validation import check_number

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

Parameters = Tensor | Iterable[Tensor | tuple[str, Tensor]]
"""Parameters, or ``(name, parameter)`` pairs as ``module.named_parameters()`` gives them; or one parameter."""


class GradientNorms(NamedTuple):
    """The norms of a set of gradients, on the gradients' device.

    Attributes:
        names: Names of the parameters that have a gradient, in order.
        per_tensor: Norm of each gradient, shape ``[P]``, float32 (float64 if a gradient is).
        total: Norm over all gradients, 0-dim.
        norm_type: The ``p`` of the norm.
    """

    names: tuple[str, ...]
    per_tensor: Tensor
    total: Tensor
    norm_type: float

    @property
    def finite(self) -> Tensor:
        """Whether every gradient is finite, as a 0-dim boolean on the device.

        Derived from the total norm: a NaN or an infinity in any element makes it non-finite. So do elements whose
        ``p``-th power float32 can't hold (for the L2 norm above 1.8e19), which no optimizer survives either.
        """
        return torch.isfinite(self.total)


class NamedParameters(list[tuple[str, Tensor]]):
    """``(name, parameter)`` pairs, each parameter once, which need not be looked through again."""


def named_parameters(parameters: Parameters) -> NamedParameters:
    """Give every parameter a name and drop repetitions, so that tied parameters count once.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs. Unnamed ones are named by their position.

    Returns:
        ``(name, parameter)`` pairs, in order, each parameter once.

    Raises:
        TypeError: If an item is neither a tensor nor a pair, as when a module itself is passed.

    Example:
        >>> weight = torch.zeros(2)
        >>> [name for name, _ in named_parameters([weight, weight, torch.ones(1)])]
        ['0', '2']
    """
    if isinstance(parameters, NamedParameters):
        return parameters
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif not isinstance(parameters, Iterable):
        raise _not_parameters(parameters)
    unique: dict[int, tuple[str, Tensor]] = {}
    for position, item in enumerate(parameters):
        if isinstance(item, Tensor):
            unique.setdefault(id(item), (str(position), item))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            unique.setdefault(id(item[1]), item)
        else:
            raise _not_parameters(item)
    return NamedParameters(unique.values())


def named_gradients(parameters: Parameters) -> NamedParameters:
    """The parameters that have a gradient, named; see :func:`named_parameters`."""
    return NamedParameters(pair for pair in named_parameters(parameters) if pair[1].grad is not None)


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


def combine_norms(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """Norm of the concatenation of tensors whose norms are given: 0 for none.

    Args:
        norms: Shape ``[P]``.
        norm_type: The ``p`` of the norm.

    Returns:
        0-dim.
    """
    return torch.linalg.vector_norm(norms, norm_type) if norms.numel() else norms.new_zeros(())


def measure_gradients(
    parameters: Parameters, norm_type: float = 2.0, inverse_scale: Tensor | None = None
) -> GradientNorms:
    """Measure the gradients of some parameters once: each norm, the total, and whether all are finite.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs; those without a gradient are left out.
        norm_type: The ``p`` of the norm: a positive number or ``inf``.
        inverse_scale: 0-dim factor for the norms of gradients that still carry a loss scale (fp16 with a fused
            optimizer). Exact where the scale is a power of two, as loss scalers have it by default.

    Returns:
        The norms, on the first gradient's device.

    Raises:
        ValueError: If ``norm_type`` is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> measure_gradients([("weight", weight)]).total
        tensor(5.)
    """
    check_number("norm_type", norm_type, above=0, allow_inf=True)
    pairs = named_gradients(parameters)
    per_tensor = tensor_norms([parameter.grad for _, parameter in pairs if parameter.grad is not None], norm_type)
    if inverse_scale is not None:
        per_tensor = per_tensor * inverse_scale.to(per_tensor.device)
    return GradientNorms(
        names=tuple(name for name, _ in pairs),
        per_tensor=per_tensor,
        total=combine_norms(per_tensor, norm_type),
        norm_type=norm_type,
    )


@torch.no_grad()
def scale_gradients_(parameters: Parameters, coefficient: Tensor) -> None:
    """Multiply all gradients in place by one coefficient that lies on the device.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs; those without a gradient are left out.
        coefficient: 0-dim. It multiplies in its own precision, so a float32 factor is not rounded to fp16 first.
    """
    values = _writable_gradients(parameters)
    for (device, dtype), members in group_by_device_and_dtype(values).items():
        group = [values[index] for index in members]
        factor = coefficient.to(device)
        if dtype.itemsize < factor.dtype.itemsize:
            torch._foreach_mul_(group, [_unrounded(factor, value) for value in group])
        else:
            torch._foreach_mul_(group, factor)


@torch.no_grad()
def scale_each_gradient_(parameters: Parameters, coefficients: Tensor) -> None:
    """Multiply each gradient in place by its own coefficient; see :func:`scale_gradients_`.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs; those without a gradient are left out.
        coefficients: One for each of the ``P`` gradients, shape ``[P]``.
    """
    values = _writable_gradients(parameters)
    factors = coefficients.unbind()
    for (device, _), members in group_by_device_and_dtype(values).items():
        group_factors = [_unrounded(factors[index].to(device), values[index]) for index in members]
        torch._foreach_mul_([values[index] for index in members], group_factors)


class GradientPass:
    """The gradients of one optimizer step: measured once per norm type, and watched for changes.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs.
        inverse_scale: See :func:`measure_gradients`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = GradientPass([("weight", weight)])
        >>> gradients.norms() is gradients.norms()
        True
        >>> _ = weight.grad.mul_(2)
        >>> gradients.changed()
        True
    """

    def __init__(self, parameters: Parameters, inverse_scale: Tensor | None = None) -> None:
        self.parameters = named_gradients(parameters)
        self.inverse_scale = inverse_scale
        self._seen = [(parameter.grad, _version(parameter.grad)) for _, parameter in self.parameters]
        self._sharded = any(isinstance(gradient, DTensor) for gradient, _ in self._seen)
        self._norms: dict[float, GradientNorms] = {}

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def norms(self, norm_type: float = 2.0) -> GradientNorms:
        """The norms, measured at the first call and kept."""
        if norm_type not in self._norms:
            self._norms[norm_type] = measure_gradients(self.parameters, norm_type, self.inverse_scale)
        return self._norms[norm_type]

    def changed(self) -> bool:
        """Whether any gradient was, or may have been, replaced or written to since the pass was taken.

        A check by the host alone, of version counters. Writes through ``.data`` escape it, as they escape autograd.
        Sharded gradients always may have changed: grouped in-place operations on a ``DTensor``, such as those of
        ``clip_grad_norm_``, leave no trace (torch 2.13). So ranks never disagree on whether to measure them again.
        """
        return self._sharded or any(
            parameter.grad is not gradient or _version(parameter.grad) != version
            for (_, parameter), (gradient, version) in zip(self.parameters, self._seen, strict=True)
        )


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: the module that owns it, or itself if that is the root module.

    Args:
        name: Full parameter name.

    Returns:
        Full module name.

    Example:
        >>> layer_of("net.0.weight"), layer_of("scale")
        ('net.0', 'scale')
    """
    return name.rpartition(".")[0] or name


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


def _pick(values: Tensor, indices: Sequence[int]) -> Tensor:
    """Some of a 1-dim tensor's elements, given in rising order, without sending the indices to its device."""
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return values[first : last + 1]
    return torch.stack([values[index] for index in indices])


def _writable_gradients(parameters: Parameters) -> list[Tensor]:
    gradients = [parameter.grad for _, parameter in named_gradients(parameters)]
    return [writable_values(gradient) for gradient in gradients if gradient is not None]


def _unrounded(factor: Tensor, value: Tensor) -> Tensor:
    """A 0-dim factor that multiplies in its own precision: off the CPU it needs dimensions for that."""
    return factor if value.device.type == "cpu" else factor.expand_as(value)


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _not_parameters(value: object) -> TypeError:
    return TypeError(
        "`parameters` must be parameters or (name, parameter) pairs, such as `model.parameters()` or "
        f"`model.named_parameters()`, got {value!r} of type {type(value).__name__}"
    )


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
