from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from recipes.data._text import Text

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
SENTENCE = "the quick brown fox jumps over the lazy dog. "


class Reader(L.LightningModule):
    """Keeps what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.read: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.read.append(batch[0])
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loaded(**arguments: Any) -> Text:
    data = Text(**arguments)
    data.setup("fit")
    return data


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def first_batches(data: Text, count: int) -> Tensor:
    return torch.stack([inputs for inputs, _ in islice(data.train_dataloader(), count)])


def test_targets_are_the_next_characters_of_the_text() -> None:
    data = loaded(batch_size=4, length=16)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    batches = [
        next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert batches[0][0].shape == batches[0][1].shape == (4, 16)
    for split, (inputs, targets) in zip(("train", "val", "test"), batches, strict=True):
        part = data.decode(data._parts[split])  # type: ignore[index]
        assert inputs.dtype == targets.dtype == torch.int64
        for row, following in zip(inputs, targets, strict=True):
            assert data.decode(row) + data.decode(following)[-1] in part
            assert torch.equal(row[1:], following[:-1])
    assert text.startswith(data.decode(data._parts["train"]))


def test_parts_are_cut_by_position_and_vocabulary_is_that_of_training(tmp_path: Path) -> None:
    text = "abc" * 80 + "bcd" * 10 + "cde" * 10
    data = loaded(length=8, path=written(tmp_path / "text.txt", text))
    assert data.vocabulary == ["a", "b", "c", "\ufffd"]
    assert data.classes == 4
    assert [len(data._parts[split]) for split in ("train", "val", "test")] == [240, 30, 30]
    assert data.decode(data._parts["val"]) == "bc\ufffd" * 10
    assert data.decode(data._parts["test"]) == "c\ufffd\ufffd" * 10


def test_encoding_goes_back_and_forth_beyond_ascii(tmp_path: Path) -> None:
    data = loaded(length=4, path=written(tmp_path / "text.txt", "naïve 😀 café\n" * 40))
    assert data.decode(data.encode("café 😀\n")) == "café 😀\n"
    assert data.encode("é!").tolist() == [data.vocabulary.index("é"), data.classes - 1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_windows_lie_side_by_side_or_at_even_distances(split: str) -> None:
    def windows(data: Text) -> Tensor:
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        return torch.cat([inputs for inputs, _ in loader])

    part = loaded()._parts[split]  # type: ignore[index]
    whole, capped = windows(loaded(length=50)), windows(loaded(length=50, max_windows=10))
    assert torch.equal(whole.flatten(), part[: whole.numel()])
    assert whole.numel() >= len(part) - 51
    assert torch.equal(capped, whole[[index * len(whole) // 10 for index in range(10)]])


def test_unigram_entropy_is_the_loss_of_the_training_frequencies(tmp_path: Path) -> None:
    train, val, test = SENTENCE * 80, "fox dog! " * 50, "brown Fox" * 50
    data = loaded(length=9, path=written(tmp_path / "text.txt", train + val + test))
    counts = Counter(train)
    total = len(train) + data.classes
    for split, part in (("val", val), ("test", test)):
        targets = part[1 : (len(part) - 1) // 9 * 9 + 1]
        expected = sum(-math.log((counts[character] + 1) / total) for character in targets) / len(targets)
        assert data.unigram_entropy(split) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_order_of_windows_comes_from_the_seed_alone() -> None:
    first = first_batches(loaded(seed=3), 5)
    torch.rand(7)
    assert torch.equal(first_batches(loaded(seed=3), 5), first)
    assert not torch.equal(first_batches(loaded(seed=4), 5), first)


def test_loading_draws_no_global_random_numbers() -> None:
    before = torch.get_rng_state()
    first_batches(loaded(), 3)
    assert torch.equal(torch.get_rng_state(), before)


class Checkpoint(L.Callback):
    """Saves after a step, while training is under way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint("interrupted.ckpt")


@pytest.mark.parametrize("interrupted_after", [3, 20, 21, 40])  # an epoch has 20 batches
def test_an_interrupted_run_reads_on_where_it_stopped(tmp_path: Path, interrupted_after: int) -> None:
    path = written(tmp_path / "text.txt", SENTENCE * 10)

    def read(ckpt_path: str | None = None) -> list[Tensor]:
        data, reader = Text(batch_size=4, length=32, seed=1, path=path), Reader()
        callbacks = [Checkpoint(interrupted_after)]
        trainer = L.Trainer(max_steps=50, enable_checkpointing=False, callbacks=callbacks, **QUIET)
        trainer.fit(reader, data, ckpt_path=ckpt_path)
        assert trainer.current_epoch >= 2
        return reader.read

    whole = read()
    assert torch.equal(torch.stack(read("interrupted.ckpt")), torch.stack(whole[interrupted_after:]))


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "neither")):
        written(tmp_path / name, text * 20)
    data = loaded(length=4, path=tmp_path)
    parts = [data.decode(data._parts[split]) for split in ("train", "val", "test")]
    assert "".join(parts).replace("\ufffd", "") == ("first" * 20 + "\n\n" + "second" * 20)


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    data = loaded(length=4, path=written(tmp_path / "text.txt", "\ufeff" + "abc" * 40))
    assert data.vocabulary == ["a", "b", "c", "\ufffd"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least 90 characters.*got 0 characters in .*text.txt"),
        (b"x" * 50, "got 50 characters"),
        (b"abc\xff" * 50, r"UTF-8, got .*text.txt: invalid start byte at byte 3"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Text(length=8, path=path).setup("fit")


def test_the_shortest_text_is_as_long_as_the_message_says(tmp_path: Path) -> None:
    data = loaded(batch_size=1, length=8, path=written(tmp_path / "text.txt", "x" * 90))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(next(iter(loader))[0]) == 1


def test_missing_files_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere, which does not exist"):
        Text(path=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"which has none"):
        Text(path=tmp_path)
