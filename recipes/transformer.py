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
from typing import Protocol, runtime_checkable

import lightning as L
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from recipes.models import CharTransformer
from recipes.runner import run_recipe
from stability_callbacks._atomic import atomic_path

__all__ = ["CharTransformer", "TextSample", "main"]


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
            with atomic_path(Path(folder, "sample.txt")) as part:
                part.write_text(f"{text}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    return run_recipe("transformer", argv)


if __name__ == "__main__":
    raise SystemExit(main())
