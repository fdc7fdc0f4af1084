"""A character-level Transformer that learns nothing but letter frequencies, and heals with the callbacks.

Scenario ``stuck``: LayerNorm after the sum with the shortcut, as in the first Transformers, and AdamW at a learning
rate of 0.01 from the first step. The loss stays finite, gradients look healthy, and the model knows no more than how
often each character occurs: it stays at the unigram entropy. With a warm-up, a cosine and clipping it learns.

Scenario ``poisoned``: in three steps one number of the embedded text is NaN. The first one kills the plain model; the
guarded one skips them.

Run it with ``python -m recipes.transformer``; ``configs/transformer.yaml`` and ``configs/transformer/`` hold every
default. Each run ends with a text that the model wrote, in ``sample.txt`` beside its logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import lightning as L
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torchmetrics import MeanMetric

from recipes._main import run_recipe
from recipes._sharding import ShardableModule

__all__ = ["CharTransformer", "TextSample", "main"]


class CharTransformer(ShardableModule):
    """Predicts each next character of a text from those before it.

    Args:
        inputs: Shape of one sample: the characters it reads at once.
        outputs: Size of the vocabulary.
        optimizer: Makes the optimizer from the parameters.
        layers: Blocks of attention and MLP.
        width: Numbers that stand for a character on its way through the blocks.
        heads: Attention heads of a block; they share the width evenly.
        norm: Where LayerNorm stands: "post" normalises the sum of shortcut and branch, as in the first Transformers,
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


@runtime_checkable
class Alphabet(Protocol):
    """What turns text into tokens and back, and knows how many of them a model reads at once."""

    length: int

    def encode(self, text: str) -> Tensor: ...

    def decode(self, tokens: Tensor) -> str: ...


class TextSample(Callback):
    """Lets the model write at the end of an evaluation: into ``sample.txt`` beside the logs, and into TensorBoard.

    It draws from a random stream of its own and changes nothing in the model. The data module turns characters into
    tokens: it has ``encode``, ``decode`` and ``length``, as :class:`recipes.data.Text` does; without them nothing is
    written, with a warning.

    Args:
        prompt: What the model goes on from.
        characters: How many characters it writes.
        temperature: Divides the logits: below 1 the likely is likelier still, 0 always takes the likeliest.
        seed: Seeds the draws.

    Attributes:
        text: What was written, the prompt included; None before a test.

    Raises:
        ValueError: If ``prompt`` is empty.

    Example:
        >>> trainer = L.Trainer(callbacks=[TextSample(prompt="The ", temperature=0.5)], logger=False)
    """

    text: str | None

    def __init__(
        self,
        prompt: str = "The ",
        characters: PositiveInt = 240,
        temperature: NonNegativeFloat = 0.8,
        seed: NonNegativeInt = 0,
    ) -> None:
        if not prompt:
            raise ValueError(f"`prompt` must hold at least one character, got {prompt!r}")
        self.prompt = prompt
        self.characters = characters
        self.temperature = temperature
        self.seed = seed
        self.text = None

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, Alphabet):
            self.text = self.write(pl_module, data)  # on every process: a sharded model needs them all
            self._log(self.text, trainer)
        else:
            rank_zero_warn(f"TextSample writes nothing: {type(data).__name__} lacks encode, decode or length.")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":  # not the validation within training
            self.on_test_end(trainer, pl_module)

    @torch.no_grad()
    def write(self, model: L.LightningModule, alphabet: Alphabet) -> str:
        """The prompt and what the model goes on with; cut short where its predictions are not finite."""
        random = torch.Generator().manual_seed(self.seed)
        tokens = alphabet.encode(self.prompt)
        for _ in range(self.characters):
            logits = model(tokens[None, -alphabet.length :].to(model.device))[0, -1].float().cpu()
            if not logits.isfinite().all():
                return f"{alphabet.decode(tokens)} [the model's predictions are not finite]"
            if self.temperature == 0:
                chosen = logits.argmax()[None]
            else:
                chosen = torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=random)
            tokens = torch.cat([tokens, chosen])
        return alphabet.decode(tokens)

    @rank_zero_only
    def _log(self, text: str, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # Indented, because TensorBoard takes text for Markdown.
                indented = "".join(f"    {line}\n" for line in text.splitlines())
                logger.experiment.add_text("sample", indented, trainer.global_step)
        for folder in {logger.log_dir for logger in trainer.loggers if logger.log_dir is not None}:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "sample.txt").write_text(f"{text}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    return run_recipe("transformer", argv)


if __name__ == "__main__":
    raise SystemExit(main())
