"""The parameters of a model, and what each is for in its layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from stability_callbacks.activations import named_modules, own_parameters
from stability_callbacks.initialization._storage import obstacle, read, write

__all__ = ["LayerParameter", "Role", "layer_parameters"]


class Role(Enum):
    """What a parameter is for."""

    KERNEL = "kernel"
    HIDDEN_KERNEL = "hidden-to-hidden kernel"
    EMBEDDING = "embedding"
    BIAS = "bias"
    NORM_SCALE = "norm scale"
    NORM_SHIFT = "norm shift"
    ACTIVATION_SLOPE = "activation slope"
    UNKNOWN = "parameter of an unknown layer"


class _Anatomy(NamedTuple):
    """What one attribute of a layer is, apart from its shape.

    Attributes:
        role: What it is for.
        blocks: Number of independent linear maps stacked along dimension 0: gates, groups, or query, key and value.
        transposed: Whether the maps lead from dimension 0 to dimension 1, as in transposed convolutions.
        stride: Of a transposed convolution, per dimension.
    """

    role: Role
    blocks: int = 1
    transposed: bool = False
    stride: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LayerParameter:
    """One parameter in its place: under one name, in one layer.

    A tied parameter is there under each of its names. A parametrized weight is there once, named as its layer sees it.

    Attributes:
        name: The parameter's full name, without the segments that wrappers add.
        module: The layer that owns it.
        module_name: The layer's full name.
        attribute: The parameter's name in the layer.
        tensors: The tensors that hold it: itself, or the originals of a parametrised weight.
        parametrization: What computes it from these; None for an ordinary parameter.
        role: What it is for.
        blocks: Number of independent linear maps stacked along dimension 0.
    """

    name: str
    module: nn.Module
    module_name: str
    attribute: str
    tensors: tuple[Tensor, ...]
    parametrization: ParametrizationList | None
    anatomy: _Anatomy

    @property
    def role(self) -> Role:
        """What the parameter is for."""
        return self.anatomy.role

    @property
    def blocks(self) -> int:
        """Number of independent linear maps stacked along dimension 0."""
        return self.anatomy.blocks

    @cached_property
    def obstacle(self) -> str | None:
        """Why it cannot or must not be written; None where it can."""
        return obstacle(self.tensors, self.parametrization)

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """Its shape as the layer sees it; None while it is lazy."""
        if any(map(is_lazy, self.tensors)):
            return None
        return tuple(self.tensors[0].shape if self.parametrization is None else self.read().shape)

    @property
    def fan_in(self) -> float:
        r"""Number of inputs that one output of a linear map sums over.

        ``in / groups * prod(kernel)`` in a convolution. A transposed convolution with a stride reaches each output with
        only a part of its kernel: ``in / groups * prod(kernel) / prod(stride)`` on average, where torch's own
        ``_calculate_fan_in_and_fan_out`` counts ``out / groups * prod(kernel)``.
        """
        return self._fans[0]

    @property
    def fan_out(self) -> float:
        """Number of outputs that one input of a linear map reaches: ``out / groups * prod(kernel)`` in a convolution.

        torch's own ``_calculate_fan_in_and_fan_out`` does not divide by the groups. Like it, this leaves the stride of
        an ordinary convolution out.
        """
        return self._fans[1]

    @cached_property
    def _fans(self) -> tuple[float, float]:
        assert self.shape is not None, "a lazy parameter has no fans"
        rows, columns, *kernel = self.shape
        rows //= self.blocks
        taps = math.prod(kernel)
        if not self.anatomy.transposed:
            return columns * taps, rows * taps
        reaching = math.prod(max(1.0, size / stride) for size, stride in zip(kernel, self.anatomy.stride, strict=True))
        return rows * reaching, columns * taps

    def read(self) -> Tensor:
        """Return its values as the layer sees them."""
        return read(self.tensors, self.parametrization)

    def write(self, value: Tensor) -> None:
        """Copy values into it, in place; through its parametrization where it has one."""
        write(self.tensors, self.parametrization, value)

    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of its values, in float32 or better; NaN where it has none."""
        if self.shape is None or math.prod(self.shape) == 0 or not self.tensors[0].is_floating_point():
            return math.nan, math.nan
        values = self.read()
        variance, mean = torch.var_mean(values.to(torch.promote_types(values.dtype, torch.float32)), correction=0)
        return float(mean), float(variance.sqrt())


def layer_parameters(model: nn.Module) -> Iterator[LayerParameter]:
    """The parameters of a model in their layers, tied ones under each of their names, in ``named_modules``' order."""
    for layer, module in named_modules(model, remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            continue  # its originals belong to the layer above
        anatomy = _anatomy(module)
        for attribute, tensors, parametrization in own_parameters(module):
            yield LayerParameter(
                name=f"{layer}.{attribute}" if layer else attribute,
                module=module,
                module_name=layer,
                attribute=attribute,
                tensors=tensors,
                parametrization=parametrization,
                anatomy=anatomy.get(attribute, _Anatomy(Role.UNKNOWN)),
            )


@singledispatch
def _anatomy(module: nn.Module) -> dict[str, _Anatomy]:
    """What the attributes of a layer are; those that are not named are unknown."""
    return {}


@_anatomy.register(nn.Linear)
@_anatomy.register(nn.Bilinear)
def _(module: nn.Linear | nn.Bilinear) -> dict[str, _Anatomy]:
    return {"weight": _Anatomy(Role.KERNEL), "bias": _Anatomy(Role.BIAS)}


@_anatomy.register(_ConvNd)
def _(module: _ConvNd) -> dict[str, _Anatomy]:
    kernel = _Anatomy(Role.KERNEL, module.groups, module.transposed, tuple(module.stride))
    return {"weight": kernel, "bias": _Anatomy(Role.BIAS)}


@_anatomy.register(nn.Embedding)
@_anatomy.register(nn.EmbeddingBag)
def _(module: nn.Embedding | nn.EmbeddingBag) -> dict[str, _Anatomy]:
    return {"weight": _Anatomy(Role.EMBEDDING)}


@_anatomy.register(_NormBase)
@_anatomy.register(nn.LayerNorm)
@_anatomy.register(nn.GroupNorm)
@_anatomy.register(nn.RMSNorm)
def _(module: nn.Module) -> dict[str, _Anatomy]:
    return {"weight": _Anatomy(Role.NORM_SCALE), "bias": _Anatomy(Role.NORM_SHIFT)}


@_anatomy.register(nn.PReLU)
def _(module: nn.PReLU) -> dict[str, _Anatomy]:
    return {"weight": _Anatomy(Role.ACTIVATION_SLOPE)}


@_anatomy.register(nn.MultiheadAttention)
def _(module: nn.MultiheadAttention) -> dict[str, _Anatomy]:
    return {
        "in_proj_weight": _Anatomy(Role.KERNEL, blocks=3),
        "q_proj_weight": _Anatomy(Role.KERNEL),
        "k_proj_weight": _Anatomy(Role.KERNEL),
        "v_proj_weight": _Anatomy(Role.KERNEL),
        "in_proj_bias": _Anatomy(Role.BIAS),
        # A learned token that is appended to the keys or values.
        "bias_k": _Anatomy(Role.EMBEDDING),
        "bias_v": _Anatomy(Role.EMBEDDING),
    }


@_anatomy.register(nn.RNNBase)
@_anatomy.register(nn.RNNCellBase)
def _(module: nn.RNNBase | nn.RNNCellBase) -> dict[str, _Anatomy]:
    gates = 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1
    roles = {
        "weight_ih": _Anatomy(Role.KERNEL, gates),
        "weight_hh": _Anatomy(Role.HIDDEN_KERNEL, gates),
        "weight_hr": _Anatomy(Role.HIDDEN_KERNEL),  # the projection lies on the path from hidden to hidden
        "bias_ih": _Anatomy(Role.BIAS, gates),
        "bias_hh": _Anatomy(Role.BIAS, gates),
    }
    attributes = (attribute for attribute, _, _ in own_parameters(module))
    return {name: roles[kind] for name in attributes if (kind := name.partition("_l")[0]) in roles}
