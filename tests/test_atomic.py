"""Files and directories are there complete or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stability_callbacks import _atomic
from stability_callbacks._atomic import atomic_path, fsync_tree, remove_atomically, remove_leftovers, tree_bytes


class PowerCutError(Exception):
    """Stands for the end of the process."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(path: Path, text: str = "new", error: BaseException | None = None) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
        if error is not None:
            raise error


def write_directory(path: Path) -> None:
    with atomic_path(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("new")
        (temporary / "empty").mkdir()


# ---- what is there in the end


def test_a_file_gets_its_name_with_its_content(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "down" / "file.txt")
    assert (tmp_path / "deep" / "down" / "file.txt").read_text() == "new"
    assert names(tmp_path / "deep" / "down") == ["file.txt"]


def test_a_file_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"


def test_the_suffix_stays_for_libraries_that_go_by_it(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "picture.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path  # or it could not be renamed
        assert not temporary.exists()
        temporary.touch()


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write(tmp_path / "atomic")
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_directory_gets_its_name_with_its_content(tmp_path: Path) -> None:
    write_directory(tmp_path / "directory")
    assert (tmp_path / "directory" / "inner" / "file").read_text() == "new"
    assert (tmp_path / "directory" / "empty").is_dir()
    assert names(tmp_path) == ["directory"]


def test_a_directory_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "precious").touch()
    with pytest.raises(OSError, match="not empty"):
        write_directory(tmp_path / "directory")
    assert names(tmp_path) == ["directory"]
    assert names(tmp_path / "directory") == ["precious"]


# ---- what is there when something goes wrong


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write(tmp_path / "file", "ne", error())
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("writer", [write, write_directory])
def test_an_error_while_renaming_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: object
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PowerCutError

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PowerCutError):
        writer(tmp_path / "new")  # type: ignore[operator]
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_process_leaves_only_what_can_be_told_apart(tmp_path: Path, kind: str) -> None:
    script = f"""
import os
from pathlib import Path
from stability_callbacks._atomic import atomic_path

with atomic_path(Path({str(tmp_path)!r}, "new")) as temporary:
    if {kind!r} == "directory":
        temporary.mkdir()
        temporary = temporary / "file"
    temporary.write_text("half")
    os._exit(9)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=False)
    assert run.returncode == 9
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".unfinished-")

    remove_leftovers(tmp_path)  # may be another process at work
    assert leftover.exists()
    remove_leftovers(tmp_path, older_than=0)
    assert names(tmp_path) == []


def test_a_leftover_is_as_old_as_the_last_write_below_it(tmp_path: Path) -> None:
    leftover = tmp_path / ".unfinished-0123-new"
    leftover.mkdir()
    (leftover / "file").touch()
    long_ago = time.time() - 10_000
    os.utime(leftover, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert leftover.exists()
    os.utime(leftover / "file", (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert not leftover.exists()


def test_leftovers_of_a_directory_that_is_not_there(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nowhere")


def test_other_hidden_files_are_nobodys_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".config").touch()
    remove_leftovers(tmp_path, older_than=-1)
    assert names(tmp_path) == [".config"]


# ---- on the disk before it has its name


def test_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(_atomic.os, "fsync", noting_fsync)
    monkeypatch.setattr(_atomic.os, "replace", noting_replace)
    write_directory(tmp_path / "new")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    written = (tmp_path / "new", *(tmp_path / "new").rglob("*"))
    assert len(written) == 4
    assert set(before) == {path.stat().st_ino for path in written}
    assert after == [tmp_path.stat().st_ino]


def test_a_tree_may_be_one_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fsync_tree(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path / "nowhere")


# ---- removing, and sizes


def test_a_directory_loses_its_name_before_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "directory")

    def fail(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(_atomic.shutil, "rmtree", fail)
        with pytest.raises(PowerCutError):
            remove_atomically(tmp_path / "directory")
    assert not (tmp_path / "directory").exists()
    remove_leftovers(tmp_path, older_than=0)
    assert names(tmp_path) == []


def test_bytes_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert tree_bytes(tmp_path) == 8
    assert tree_bytes(tmp_path / "b") == 3
