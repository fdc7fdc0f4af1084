"""Text as a stream of characters: the topics of Python's own documentation, or text files of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.data._loader import shuffled_batches

__all__ = ["Text"]

Split = Literal["train", "val", "test"]

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
EVALUATION_BATCH_SIZE = 64
OVERLAP = 8


class Text(L.LightningDataModule):
    """Windows of text and, for each character of them, the one that comes next.

    The text is cut by position: the first 80 % train, the next 10 % validate, the last 10 % test. Training windows lie
    at random places and overlap: an epoch reads each character about eight times. Windows for validation and test lie
    side by side. A batch is a pair of token tensors ``(batch, length)``: inputs and targets.

    Args:
        batch_size: Windows a training batch.
        length: Characters a window.
        seed: Seeds the order of the training windows, in a random stream of its own, so that two models trained from
            one seed read the same windows in the same order, and so does a run that was interrupted.
        path: A text file in UTF-8, or a folder whose ``*.txt`` files are joined in the order of their names. None: the
            documentation topics that come with Python, about 0.45 MB; their text depends on the version of Python.
        max_windows: Windows that an evaluation reads at most; from a longer part they are taken at even distances.

    Attributes:
        classes: Size of the vocabulary, known after ``setup``.
        vocabulary: The characters of the training part in sorted order, and one that stands for all others.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no ``*.txt`` file in the folder.
        ValueError: In ``setup``, if a file is not UTF-8 or the text is too short.

    Example:
        >>> data = Text(batch_size=2, length=8)
        >>> data.setup("fit")
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
        (torch.Size([2, 8]), True)
        >>> data.decode(data.encode("for x in range(3):"))
        'for x in range(3):'
    """

    vocabulary: list[str]

    def __init__(
        self,
        batch_size: PositiveInt = 16,
        length: PositiveInt = 64,
        seed: NonNegativeInt = 0,
        path: Path | None = None,
        max_windows: PositiveInt = 1024,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.path = None if path is None else path.expanduser()
        self.max_windows = max_windows
        self.vocabulary = []
        self._parts: dict[Split, Tensor] = {}
        if self.path is not None:
            _text_files(self.path)

    @property
    def classes(self) -> int:
        return len(self.vocabulary)

    def setup(self, stage: str) -> None:
        if self._parts:
            return
        text = _built_in_text() if self.path is None else "\n\n".join(map(_read, _text_files(self.path)))
        first, second = len(text) * 8 // 10, len(text) * 9 // 10
        shortest = min(first, second - first, len(text) - second)
        if shortest < self.length + 1:
            raise ValueError(
                f"`path` must hold at least {10 * (self.length + 1)} characters, so that a tenth of them is longer than"
                f" a window of `length` {self.length}, got {len(text)} characters in {self.path}"
            )
        self.vocabulary = [*sorted(set(text[:first])), UNKNOWN]
        tokens = self.encode(text)
        self._parts = {"train": tokens[:first], "val": tokens[first:second], "test": tokens[second:]}

    def encode(self, text: str) -> Tensor:
        """Turn text into tokens; a character that the training part lacks becomes the last one of the vocabulary."""
        known = _code_points("".join(self.vocabulary[:-1]))
        codes = _code_points(text)
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return torch.from_numpy(np.where(known[places] == codes, places, len(known)))

    def decode(self, tokens: Tensor) -> str:
        """Turn tokens into text."""
        return "".join(self.vocabulary[token] for token in tokens.tolist())

    def unigram_entropy(self, split: Split = "test") -> float:
        """The loss, in nats a character, of guessing by the frequencies of the training part whatever came before.

        The line at which a model is stuck that has learned how often each character occurs, and nothing else. Each
        character counts once more than it occurs, so that one that is missing from the training part costs no infinity.
        """
        counts = torch.bincount(self._parts["train"], minlength=self.classes).double() + 1
        targets = torch.cat([targets for _, targets in DataLoader(self._evaluated(split), EVALUATION_BATCH_SIZE)])
        return float(-(counts / counts.sum()).log()[targets].mean())

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = self._parts["train"]
        starts = range(0, len(tokens) - self.length, max(1, self.length // OVERLAP))
        windows = _Windows(tokens, self.length, starts)
        return shuffled_batches(windows, self.batch_size, self.seed, self.trainer)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self._evaluated("val"), EVALUATION_BATCH_SIZE)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self._evaluated("test"), EVALUATION_BATCH_SIZE)

    def _evaluated(self, split: Split) -> _Windows:
        tokens = self._parts[split]
        starts = range(0, len(tokens) - self.length, self.length)
        kept = min(len(starts), self.max_windows)
        return _Windows(tokens, self.length, [starts[index * len(starts) // kept] for index in range(kept)])


class _Windows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, tokens: Tensor, length: int, starts: Sequence[int]) -> None:
        self.tokens = tokens
        self.length = length
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[self.starts[index] :][: self.length + 1]
        return window[:-1], window[1:]


def _code_points(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _built_in_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a text file or a folder of them, got {path}, which does not exist")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"`path` must be a text file or a folder with *.txt files, got {path}, which has none")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`path` must hold text in UTF-8, got {file}: {error.reason} at byte {error.start}") from error
