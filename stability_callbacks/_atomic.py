"""Files and directories that are there complete or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "fsync", "fsync_tree", "remove_atomically", "remove_leftovers", "tree_bytes"]

_PREFIX = ".unfinished-"


@contextmanager
def atomic_path(path: str | os.PathLike[str], exclusive: bool = False) -> Iterator[Path]:
    """Give a temporary path beside the wanted one to write a file or directory to, and move it there when complete.

    What was written is on the disk before it gets its name, so a process killed at any moment, and a power cut too,
    leaves either what was there before or all of the new. Missing parent directories are made. After an exception
    nothing is left; a killed process leaves an ``.unfinished-*`` sibling, which :func:`remove_leftovers` removes.

    Args:
        path: The wanted path. A file there is replaced, and an empty directory by a directory.
        exclusive: Whether a file there is an error instead, even one that another process has just written.

    Yields:
        A path in the same directory, with the same suffix, at which nothing exists yet.

    Raises:
        OSError: If it can't be written, or if a directory with something in it is in the way.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     with atomic_path(Path(directory, "answer.txt")) as temporary:
        ...         _ = temporary.write_text("42")
        ...     [path.name for path in Path(directory).iterdir()]
        ['answer.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    try:
        yield temporary
        fsync_tree(temporary)
        if exclusive and temporary.is_file():
            os.link(temporary, target)
            temporary.unlink()
        else:
            temporary.replace(target)
    except BaseException:
        _remove(temporary)
        raise
    fsync(target.parent)


def remove_atomically(path: str | os.PathLike[str]) -> None:
    """Remove a file or directory so that no part of it is left under its name if the process is killed meanwhile."""
    target = Path(path)
    temporary = _sibling(target)
    target.replace(temporary)
    _remove(temporary)


def remove_leftovers(directory: str | os.PathLike[str], older_than: float = 3600.0) -> None:
    """Remove what killed processes left in a directory while they wrote to an :func:`atomic_path` in it.

    Args:
        directory: The directory; it need not exist.
        older_than: Seconds since something was last written to it. What is younger may be another process's, at work.
    """
    for path in Path(directory).glob(f"{_PREFIX}*"):
        try:
            age = time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
        except FileNotFoundError:  # its writer has finished
            continue
        if age > older_than:
            _remove(path)


def fsync_tree(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a directory with everything below it, is on the disk."""
    for each in Path(path).rglob("*"):
        fsync(each)
    fsync(path)


def fsync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    is_directory = Path(path).is_dir()
    if is_directory and os.name == "nt":  # Windows does not open directories
        return
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tree_bytes(path: Path) -> int:
    """The bytes of a file, or of all files below a directory."""
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir())


def _sibling(target: Path) -> Path:
    # Not from `random`, whose state belongs to the user's run.
    return target.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{target.name}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
