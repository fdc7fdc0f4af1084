"""Convolutional networks of one width, with and without ways around their blocks, and ResNet-18."""

from __future__ import annotations

from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from recipes.models._blocks import BlockKind, NormKind, ResidualBlock, Reversible, block, normed
from recipes.models._training import ImageClassifier

__all__ = ["ConvNet", "ResNet18"]

WeightKind = Literal["torch", "he"]


class ConvNet(ImageClassifier):
    """A stem that halves the image, a row of blocks of two convolutions each, 2x2 average pooling, a linear layer.

    Args:
        inputs: Shape of one image: channels, height, width.
        outputs: Number of classes.
        optimizer: Makes the optimizer from the parameters.
        blocks: Number of blocks; the depth is twice that.
        channels: Channels of every block.
        block: Kind of the blocks: "basic" has a shortcut around its two convolutions, "plain" has none, "depthwise"
            and "dilated" have a shortcut and those convolutions, "invertible" can be run backwards.
        norm: What follows each convolution: batch normalization, or nothing.
        weights: How convolutions start: "torch" is PyTorch's default, "he" is Kaiming normal, the one that is
            written in most published networks.

    Raises:
        ValueError: If the images are not of shape (channels, height, width), or smaller than 3x3.
    """

    def __init__(
        self,
        inputs: torch.Size,
        outputs: int,
        optimizer: OptimizerCallable,
        blocks: NonNegativeInt = 10,
        channels: PositiveInt = 16,
        block: BlockKind = "basic",
        norm: NormKind = "batch",
        weights: WeightKind = "torch",
    ) -> None:
        super().__init__(outputs, optimizer)
        planes, height, width = _image(inputs)
        self.stem = nn.Sequential(*normed(planes, channels, norm, stride=2), nn.ReLU())
        self.blocks = _stack(block, blocks, channels, norm)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(channels * ((height + 1) // 4) * ((width + 1) // 4), outputs)
        if weights == "he":
            _kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, classes)."""
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(images))).flatten(1))
        return logits


class ResNet18(ImageClassifier):
    """ResNet-18 (He et al. 2015, arXiv 1512.03385).

    Args:
        inputs: Shape of one image: channels, height, width.
        outputs: Number of classes.
        optimizer: Makes the optimizer from the parameters.
        small_stem: Start with a 3x3 convolution, as is usual for images of 32x32 and below; otherwise as published,
            with a 7x7 convolution of stride 2 and max pooling.

    Raises:
        ValueError: If the images are not of shape (channels, height, width).
    """

    def __init__(self, inputs: torch.Size, outputs: int, optimizer: OptimizerCallable, small_stem: bool = True) -> None:
        super().__init__(outputs, optimizer)
        planes, _, _ = _image(inputs)
        if small_stem:
            self.stem = nn.Sequential(*normed(planes, 64, "batch"), nn.ReLU())
        else:
            wide = nn.Conv2d(planes, 64, 7, stride=2, padding=3, bias=False)
            self.stem = nn.Sequential(wide, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ResidualBlock(before, after, stride=stride), ResidualBlock(after, after))
                for before, after, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, outputs)
        _kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(images))).flatten(1))
        return logits


def _image(shape: torch.Size) -> torch.Size:
    if len(shape) != 3 or min(shape[1:]) < 3:
        raise ValueError(f"`inputs` must be images of (channels, height, width), 3x3 or larger; got {tuple(shape)}")
    return shape


def _stack(kind: BlockKind, count: int, channels: int, norm: NormKind) -> nn.Sequential:
    stack = Reversible if kind == "invertible" else nn.Sequential
    return stack(*(block(kind, channels, norm) for _ in range(count)))


def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
