"""Which checkpoint is the newest that can be read."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stability_callbacks import newest_readable_checkpoint
from tests.models import NormNet, fit, make_batches

STATE = {"state_dict": {"weight": torch.arange(100.0)}, "epoch": 1}


class Settings:
    """Stands for a hyper-parameter that is not plain data."""


def write(directory: Path, *names: str, content: Any = STATE) -> list[Path]:
    """Write checkpoints, each a second newer than the one before, and all newer than those that are there."""
    directory.mkdir(parents=True, exist_ok=True)
    time = 1000 + max((int(path.stat().st_mtime) for path in directory.iterdir()), default=0)
    for seconds, name in enumerate(names):
        torch.save(content, directory / name)
        os.utime(directory / name, (time + seconds, time + seconds))
    return [directory / name for name in names]


def damage(path: Path, change: Any) -> None:
    stat = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, (stat.st_atime, stat.st_mtime))


def flip_a_bit_of_the_weight(content: bytes) -> bytes:
    # So that `torch.load` alone would not notice.
    value = torch.tensor(50.0).numpy().tobytes()
    return content.replace(value, torch.tensor(-50.0).numpy().tobytes(), 1)


def test_the_one_written_last_is_taken(tmp_path: Path) -> None:
    first, second = write(tmp_path, "step=9.ckpt", "step=10.ckpt")
    assert newest_readable_checkpoint(tmp_path) == second
    os.utime(first)
    assert newest_readable_checkpoint(str(tmp_path)) == first


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:1], id="one byte"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content[:-1], id="all but one byte"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
        pytest.param(lambda content: b"PL" + content[2:], id="header"),
        pytest.param(lambda content: content[:-26] + b"\x00" + content[-25:], id="table of contents"),
        pytest.param(flip_a_bit_of_the_weight, id="bit flipped in a weight"),
    ],
)
def test_damaged_ones_are_named_and_the_next_older_one_is_taken(
    change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, *damaged = write(tmp_path, "good.ckpt", "bad.ckpt", "worse.ckpt")
    for path in damaged:
        before = path.read_bytes()
        damage(path, change)
        assert path.read_bytes() != before
    with caplog.at_level(logging.WARNING):
        assert newest_readable_checkpoint(tmp_path) == good
    assert [record.args[0] for record in caplog.records] == damaged[::-1]  # type: ignore[index]
    assert all("is damaged" in record.message for record in caplog.records)


def test_if_all_are_damaged_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in write(tmp_path, "one.ckpt", "two.ckpt"):
        damage(path, lambda content: content[:-5])
    assert newest_readable_checkpoint(tmp_path) is None
    assert f"None of the 2 checkpoints in {tmp_path} can be read" in caplog.text


def test_there_may_be_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_readable_checkpoint(tmp_path) is None
    assert newest_readable_checkpoint(tmp_path / "not yet there") is None
    (tmp_path / "notes.txt").touch()
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone.ckpt")
    write(tmp_path / "inner", "step=1.ckpt")
    assert newest_readable_checkpoint(tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3  # that there is none
    assert "damaged" not in caplog.text


def test_objects_that_need_trust_are_no_damage(tmp_path: Path) -> None:
    [path] = write(tmp_path, "step=1.ckpt", content={**STATE, "hyper_parameters": Settings()})
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    assert newest_readable_checkpoint(tmp_path) == path


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_training_goes_on_from_it(tmp_path: Path) -> None:
    def train(steps: int) -> int:
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        path = newest_readable_checkpoint(tmp_path)
        model = NormNet()
        fit(model, make_batches(8), [checkpoint], ckpt_path=path, max_steps=steps, enable_checkpointing=True)
        return len(model.losses)

    assert train(4) == 4
    damage(tmp_path / "step=4.ckpt", lambda content: content[:-100])
    assert train(8) == 8 - 2


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`directory` must be a path, got None"):
        newest_readable_checkpoint(None)  # type: ignore[arg-type]
    [path] = write(tmp_path, "step=1.ckpt")
    with pytest.raises(NotADirectoryError, match=r"got the file .*step=1\.ckpt"):
        newest_readable_checkpoint(path)


def test_an_empty_or_missing_folder_and_one_level_too_high_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_readable_checkpoint(tmp_path / "typo") is None
    assert "does not exist: training starts anew" in caplog.text
    (tmp_path / "checkpoints").mkdir()
    assert newest_readable_checkpoint(tmp_path) is None
    assert f"no checkpoint in {tmp_path}: training starts anew" in caplog.text
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "step=1.ckpt")
    assert newest_readable_checkpoint(tmp_path) is None
    assert "but 1 below it, such as" in caplog.text
