"""The gain of an activation: by how much the layer before it must be scaled for the signal to keep its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stability_callbacks.initialization._storage import read

__all__ = [
    "ACTIVATION_NAMES",
    "NO_ACTIVATION",
    "Activation",
    "module_activation",
    "named_activation",
    "second_moment_gain",
]

# Kaiming's argument holds for these: the layer before is scaled so that the activation's output has second moment 1.
_RECTIFIERS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
}
# Xavier's argument holds for these: they are linear around 0 and saturate away from it.
_SATURATING: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "softsign": F.softsign,
}
# What the field uses, as `torch.nn.init.calculate_gain` has it, where it is not the second-moment gain.
_CONVENTIONAL = {"tanh": nn.init.calculate_gain("tanh"), "sigmoid": 1.0, "hardsigmoid": 1.0}


ACTIVATION_NAMES = (*_RECTIFIERS, *_SATURATING)
_SPELLINGS = {name.replace("_", ""): name for name in ACTIVATION_NAMES}


class Activation(NamedTuple):
    """An activation function, seen from the layer before it.

    Attributes:
        name: What it is called, for reports; empty for none.
        gain: Factor on that layer's standard deviation.
        saturating: Whether the layer wants Xavier's scheme, as tanh and no activation do, rather than Kaiming's.
    """

    name: str
    gain: float
    saturating: bool

    def __str__(self) -> str:
        return f"before {self.name}" if self.name else "no activation found after it"


NO_ACTIVATION = Activation("", 1.0, True)


def second_moment_gain(function: Callable[[Tensor], Tensor]) -> float:
    r"""The gain that keeps the second moment of a signal through an elementwise function.

    .. math:: \text{gain} = \Big(\mathbb{E}_{z \sim N(0, 1)}\, f(z)^2\Big)^{-1/2}

    It is :math:`\sqrt 2` for ReLU and 1 for SELU, and extends Kaiming's argument to any activation: GELU 1.53, SiLU
    1.68, ELU 1.25, Mish 1.49.

    Args:
        function: An elementwise function of float64 values.

    Returns:
        The gain; infinity where the function is zero everywhere.

    Example:
        >>> round(second_moment_gain(torch.relu), 6)
        1.414214
    """
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    moment = float((density * function(z.clone()).square()).sum() / density.sum())
    return 1 / math.sqrt(moment) if moment > 0 else math.inf


def named_activation(name: str, function: Callable[[Tensor], Tensor] | None = None) -> Activation | None:
    """The activation that torch knows under a name.

    Args:
        name: As torch spells it, as a module, function or method: ``LeakyReLU``, ``leaky_relu``, ``leaky_relu_``.
        function: The activation with its arguments filled in (a slope, an alpha); None for torch's defaults.

    Returns:
        The activation, or None where the name is not one.

    Example:
        >>> named_activation("Tanh")
        Activation(name='Tanh', gain=1.6666666666666667, saturating=True)
    """
    spelling = _SPELLINGS.get(name.replace("_", "").lower())
    if spelling is None:
        return None
    if spelling in _CONVENTIONAL:
        gain = _CONVENTIONAL[spelling]
    else:
        gain = second_moment_gain(function) if function is not None else _default_gain(spelling)
    return Activation(name.rstrip("_"), gain, saturating=spelling in _SATURATING)


def module_activation(module: nn.Module) -> Activation | None:
    """The activation that a module of ``torch.nn`` is, or None where it is something else."""
    if isinstance(module, nn.PReLU):
        slope = float(read((module.weight,), None).float().mean())
        return named_activation("leaky_relu", partial(F.leaky_relu, negative_slope=slope))
    if isinstance(module, nn.RReLU):
        return named_activation("leaky_relu", partial(F.leaky_relu, negative_slope=(module.lower + module.upper) / 2))
    for base in type(module).__mro__:
        if base.__module__ == nn.ReLU.__module__ and named_activation(base.__name__) is not None:
            # `forward` itself: calling the module would call the user's hooks.
            return named_activation(base.__name__, module.forward)
    return None


@cache
def _default_gain(name: str) -> float:
    return second_moment_gain(_RECTIFIERS[name] if name in _RECTIFIERS else _SATURATING[name])
