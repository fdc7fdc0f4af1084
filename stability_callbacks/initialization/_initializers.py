"""What may be written into a parameter: each a small recipe with its description."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from stability_callbacks.initialization._layer_parameters import LayerParameter

__all__ = [
    "DISTRIBUTIONS",
    "FANS",
    "Distribution",
    "Fan",
    "Initializer",
    "constant",
    "kaiming",
    "normal",
    "orthogonal",
    "trunc_normal",
    "xavier",
]

Distribution = Literal["uniform", "normal"]
Fan = Literal["fan_in", "fan_out"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("uniform", "normal")
FANS: tuple[Fan, ...] = ("fan_in", "fan_out")


class Initializer(NamedTuple):
    """What to write into a parameter.

    Attributes:
        what: What it is, in words, for the report.
        draw: Fills a tensor of the parameter's shape, on the CPU and in float32 or better, in place, drawing random
            numbers from torch's default generator.
    """

    what: str
    draw: Callable[[Tensor], Any]

    def because(self, reason: object) -> Initializer:
        """The same, with a reason added to the words."""
        return self._replace(what=f"{self.what} ({reason})")


def constant(value: float) -> Initializer:
    """The same number everywhere."""
    return Initializer({0.0: "zeros", 1.0: "ones"}.get(value, f"{value:g}"), lambda tensor: tensor.fill_(value))


def xavier(param: LayerParameter, gain: float, distribution: Distribution = "uniform") -> Initializer:
    """Xavier's scheme for each linear map of a kernel."""
    std = gain * math.sqrt(2.0 / (param.fan_in + param.fan_out))
    return Initializer(f"Xavier {distribution}{_per_block(param)}, gain {gain:.3g}", _spread(std, distribution))


def kaiming(
    param: LayerParameter, gain: float, mode: Fan = "fan_in", distribution: Distribution = "normal"
) -> Initializer:
    """Kaiming's scheme for each linear map of a kernel."""
    fan = param.fan_in if mode == "fan_in" else param.fan_out
    what = f"Kaiming {distribution}{_per_block(param)}, {mode} {fan:g}, gain {gain:.3g}"
    return Initializer(what, _spread(gain / math.sqrt(fan), distribution))


def orthogonal(param: LayerParameter, gain: float) -> Initializer:
    """An orthogonal matrix (semi-orthogonal where it is not square) for each linear map of a kernel."""

    def draw(tensor: Tensor) -> None:
        for block in tensor.chunk(param.blocks):
            nn.init.orthogonal_(block, gain)

    return Initializer(f"orthogonal{_per_block(param)}, gain {gain:.3g}", draw)


def normal(param: LayerParameter, std: float) -> Initializer:
    """Normal values; the padding row of an embedding is zero."""
    return Initializer(f"normal, std {std:.3g}", _padded(param, partial(nn.init.normal_, std=std)))


def trunc_normal(param: LayerParameter, std: float) -> Initializer:
    """Normal values, drawn anew beyond two standard deviations; the padding row of an embedding is zero."""
    draw = partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)
    return Initializer(f"truncated normal, std {std:.3g}", _padded(param, draw))


def _spread(std: float, distribution: Distribution) -> Callable[[Tensor], Any]:
    bound = math.sqrt(3.0) * std
    uniform = partial(nn.init.uniform_, a=-bound, b=bound)
    return uniform if distribution == "uniform" else partial(nn.init.normal_, std=std)


def _padded(param: LayerParameter, draw: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    padding_idx = getattr(param.module, "padding_idx", None)

    def draw_padded(tensor: Tensor) -> None:
        draw(tensor)
        if padding_idx is not None:
            tensor[padding_idx] = 0

    return draw_padded


def _per_block(param: LayerParameter) -> str:
    return f" per block ({param.blocks})" if param.blocks > 1 else ""
