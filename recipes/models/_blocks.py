"""The building blocks of the convolutional networks: two convolutions each, with and without a way around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["AdditiveCoupling", "BlockKind", "NormKind", "PlainBlock", "ResidualBlock", "Reversible", "block", "normed"]

BlockKind = Literal["basic", "plain", "depthwise", "dilated", "invertible"]
NormKind = Literal["none", "batch"]

Convolution = Callable[[int, int, int, bool], nn.Module]
"""Makes a convolution from input channels, output channels, stride, and whether it has a bias."""


def convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Module:
    """A 3x3 convolution that keeps height and width, but for its stride."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def separable_convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Module:
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across them: a ninth of the weights."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=bias),
    )


def dilated_convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Module:
    """A 3x3 convolution with gaps of one pixel: it sees 5x5 at the price of 3x3."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=2, dilation=2, bias=bias)


def normed(
    inputs: int, outputs: int, norm: NormKind, stride: int = 1, make: Convolution = convolution
) -> Iterator[nn.Module]:
    """A convolution and the norm after it, if any; a bias only where no norm would take it away again."""
    yield make(inputs, outputs, stride, norm == "none")
    if norm == "batch":
        yield nn.BatchNorm2d(outputs)


class PlainBlock(nn.Module):
    """Two convolutions in a row.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        norm: What follows each convolution.
        stride: Of the first convolution.
        make: Makes the convolutions.
    """

    def __init__(
        self, inputs: int, outputs: int, norm: NormKind = "batch", stride: int = 1, make: Convolution = convolution
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *normed(inputs, outputs, norm, stride, make), nn.ReLU(), *normed(outputs, outputs, norm, 1, make)
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x))
        return y


class ResidualBlock(PlainBlock):
    """Two convolutions and a shortcut around them, the block of ResNet-18 (He et al. 2015, arXiv 1512.03385).

    The shortcut is a 1x1 convolution where the shape changes, and the identity elsewhere. The arguments are those of
    :class:`PlainBlock`.
    """

    def __init__(
        self, inputs: int, outputs: int, norm: NormKind = "batch", stride: int = 1, make: Convolution = convolution
    ) -> None:
        super().__init__(inputs, outputs, norm, stride, make)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*normed(inputs, outputs, norm, stride, projection)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.shortcut(x) + self.body(x))
        return y


def projection(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Module:
    """A 1x1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=bias)


class AdditiveCoupling(nn.Module):
    r"""A block that can be run backwards: what came in is computed from what went out.

    The channels are halved into :math:`x_1` and :math:`x_2`, and

    .. math:: y_1 = x_1 + F(x_2), \quad y_2 = x_2 + G(y_1)
        \qquad\Leftrightarrow\qquad x_2 = y_2 - G(y_1), \quad x_1 = y_1 - F(x_2)

    ``F`` and ``G`` are norm, ReLU, convolution; they need no inverse themselves. Only rounding is lost on the way back.
    With batch norm, be in the same mode on both ways: in training mode both see the same batch, so the statistics are
    the same, too, but they enter the running ones twice.

    Args:
        channels: Channels that come in and go out; even.
        norm: What ``F`` and ``G`` start with.

    Raises:
        ValueError: If the number of channels is odd.

    Example:
        >>> block = AdditiveCoupling(4, norm="none")
        >>> x = torch.randn(1, 4, 5, 5)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True

    References:
        Dinh, Krueger, Bengio: NICE (2014), arXiv 1410.8516. Gomez, Ren, Urtasun, Grosse: The reversible residual
        network (2017), arXiv 1707.04585.
    """

    def __init__(self, channels: int, norm: NormKind = "batch") -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"`channels` must be even for invertible blocks, which halve them; got {channels}")
        self.f = _preactivated(channels // 2, norm)
        self.g = _preactivated(channels // 2, norm)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat((y1, y2), dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the ``x`` with ``forward(x) == y``."""
        y1, y2 = y.chunk(2, dim=1)
        x2 = y2 - self.g(y1)
        x1 = y1 - self.f(x2)
        return torch.cat((x1, x2), dim=1)


class Reversible(nn.Sequential):
    """Invertible blocks in a row, which can be run backwards as a whole."""

    def inverse(self, y: Tensor) -> Tensor:
        """Return the ``x`` with ``forward(x) == y``."""
        for each in reversed(self):
            assert isinstance(each, AdditiveCoupling)
            y = each.inverse(y)
        return y


def block(kind: BlockKind, channels: int, norm: NormKind) -> nn.Module:
    """Make one block that keeps its shape.

    Args:
        kind: ``"basic"`` (3x3, residual), ``"plain"`` (the same without a shortcut), ``"depthwise"`` (separable,
            residual), ``"dilated"`` (residual), or ``"invertible"``.
        channels: Channels that come in and go out.
        norm: What follows each convolution, or precedes it in invertible blocks.
    """
    if kind == "invertible":
        return AdditiveCoupling(channels, norm)
    if kind == "plain":
        return PlainBlock(channels, channels, norm)
    convolutions: dict[BlockKind, Convolution] = {
        "basic": convolution,
        "depthwise": separable_convolution,
        "dilated": dilated_convolution,
    }
    return ResidualBlock(channels, channels, norm, make=convolutions[kind])


def _preactivated(channels: int, norm: NormKind) -> nn.Module:
    norms = [nn.BatchNorm2d(channels)] if norm == "batch" else []
    # A bias either way: here no norm follows that would take it away.
    return nn.Sequential(*norms, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))
