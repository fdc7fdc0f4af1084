"""A character-level Transformer."""

from __future__ import annotations

from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torchmetrics import MeanMetric

from recipes.models._training import ShardableModule

__all__ = ["CausalSelfAttention", "CharTransformer"]


class CharTransformer(ShardableModule):
    """Predicts each next character of a text from those before it.

    Args:
        inputs: Shape of one sample: the characters it reads at once.
        outputs: Size of the vocabulary.
        optimizer: Makes the optimizer from the parameters.
        layers: Blocks of attention and MLP.
        width: Numbers that stand for a character on its way through the blocks.
        heads: Attention heads of a block; they share the width evenly.
        norm: Where LayerNorm stands: "post" normalizes the sum of shortcut and branch, as in the first Transformers,
            "pre" what goes into the branch, as in most of today's.
        dropout: Share of values dropped in attention and at the end of each branch.
    """

    def __init__(
        self,
        inputs: torch.Size,
        outputs: int,
        optimizer: OptimizerCallable,
        layers: PositiveInt = 6,
        width: PositiveInt = 64,
        heads: PositiveInt = 4,
        norm: Literal["post", "pre"] = "post",
        dropout: ClosedUnitInterval = 0.0,
    ) -> None:
        super().__init__()
        (length,) = inputs
        self.optimizer = optimizer
        self.characters = nn.Embedding(outputs, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()  # a post-LN block ends in one
        self.head = nn.Linear(width, outputs)
        # Disabled: it would drop NaN from the mean, and a ruined model would look healthy.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.test_loss = MeanMetric(nan_strategy="disable")

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(batch, time)`` to logits ``(batch, time, vocabulary)``."""
        stream: Tensor = self.characters(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._losses(batch).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_loss.update(self._losses(batch))
        self.log("val/loss", self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.test_loss.update(self._losses(batch))
        self.log("test/loss", self.test_loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())

    def _losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each character."""
        tokens, targets = batch
        logits = self(tokens)
        losses: Tensor = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses


class Block(nn.Module):
    """Attention, then an MLP, each beside a shortcut.

    Args:
        width: Width of the stream.
        heads: Attention heads.
        norm: Whether LayerNorm comes before each branch ("pre") or after the sum with the shortcut ("post").
        dropout: Share of values dropped.
    """

    def __init__(self, width: int, heads: int, norm: Literal["post", "pre"], dropout: float) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, stream: Tensor) -> Tensor:
        if self.pre:
            stream = stream + self.attention(self.attention_norm(stream))
            stream = stream + self.mlp(self.mlp_norm(stream))
        else:
            stream = self.attention_norm(stream + self.attention(stream))
            stream = self.mlp_norm(stream + self.mlp(stream))
        return stream


class CausalSelfAttention(nn.Module):
    """Each character looks at itself and those before it.

    Args:
        width: Width of the stream.
        heads: Attention heads; ``width`` must be a multiple of it.
        dropout: Share of attention weights and of outputs dropped.

    Raises:
        ValueError: If ``width`` is not a multiple of ``heads``.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads`, got width={width} and heads={heads}")
        self.heads = heads
        self.attention_dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        query, key, value = self.query_key_value(stream).chunk(3, dim=-1)
        mixed = scaled_dot_product_attention(
            self._split(query),
            self._split(key),
            self._split(value),
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=True,
        )
        joined: Tensor = self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return joined

    def _split(self, part: Tensor) -> Tensor:
        by_head: Tensor = part.unflatten(-1, (self.heads, -1))
        return by_head.transpose(1, 2)
