"""What may be written into a parameter: each a small recipe with its description."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from stability_callbacks.initialization._slots import Slot

__all__ = [
    "DISTRIBUTIONS",
    "FANS",
    "Distribution",
    "Fan",
    "Fill",
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


class Fill(NamedTuple):
    """What to write into a parameter.

    Attributes:
        what: What it is, in words, for the report.
        draw: Fills a tensor of the parameter's shape, on the CPU and in float32 or better, in place, drawing random
            numbers from torch's default generator.
    """

    what: str
    draw: Callable[[Tensor], Any]

    def because(self, reason: object) -> Fill:
        """The same, with a reason added to the words."""
        return self._replace(what=f"{self.what} ({reason})")


def constant(value: float) -> Fill:
    """The same number everywhere."""
    return Fill({0.0: "zeros", 1.0: "ones"}.get(value, f"{value:g}"), lambda tensor: tensor.fill_(value))


def xavier(slot: Slot, gain: float, distribution: Distribution = "uniform") -> Fill:
    """Xavier's scheme for each linear map of a kernel."""
    std = gain * math.sqrt(2.0 / (slot.fan_in + slot.fan_out))
    return Fill(f"Xavier {distribution}{_per_block(slot)}, gain {gain:.3g}", _spread(std, distribution))


def kaiming(slot: Slot, gain: float, mode: Fan = "fan_in", distribution: Distribution = "normal") -> Fill:
    """Kaiming's scheme for each linear map of a kernel."""
    fan = slot.fan_in if mode == "fan_in" else slot.fan_out
    what = f"Kaiming {distribution}{_per_block(slot)}, {mode} {fan:g}, gain {gain:.3g}"
    return Fill(what, _spread(gain / math.sqrt(fan), distribution))


def orthogonal(slot: Slot, gain: float) -> Fill:
    """An orthogonal matrix (semi-orthogonal where it is not square) for each linear map of a kernel."""

    def draw(tensor: Tensor) -> None:
        for block in tensor.chunk(slot.blocks):
            nn.init.orthogonal_(block, gain)

    return Fill(f"orthogonal{_per_block(slot)}, gain {gain:.3g}", draw)


def normal(slot: Slot, std: float) -> Fill:
    """Normal values; the padding row of an embedding is zero."""
    return Fill(f"normal, std {std:.3g}", _padded(slot, partial(nn.init.normal_, std=std)))


def trunc_normal(slot: Slot, std: float) -> Fill:
    """Normal values, drawn anew beyond two standard deviations; the padding row of an embedding is zero."""
    draw = partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)
    return Fill(f"truncated normal, std {std:.3g}", _padded(slot, draw))


def _spread(std: float, distribution: Distribution) -> Callable[[Tensor], Any]:
    bound = math.sqrt(3.0) * std
    uniform = partial(nn.init.uniform_, a=-bound, b=bound)
    return uniform if distribution == "uniform" else partial(nn.init.normal_, std=std)


def _padded(slot: Slot, draw: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    padding_idx = getattr(slot.module, "padding_idx", None)

    def draw_padded(tensor: Tensor) -> None:
        draw(tensor)
        if padding_idx is not None:
            tensor[padding_idx] = 0

    return draw_padded


def _per_block(slot: Slot) -> str:
    return f" per block ({slot.blocks})" if slot.blocks > 1 else ""
