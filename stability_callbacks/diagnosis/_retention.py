"""Which bundles to keep, so that a run that goes bad for a week does not fill the disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from stability_callbacks._atomic import remove_atomically, remove_leftovers, tree_bytes
from stability_callbacks._nesting import named_leaves
from stability_callbacks._validation import check_integer
from stability_callbacks.diagnosis._bundle import BundleError, read_manifest

__all__ = ["bundles", "make_room", "tensor_bytes"]


def bundles(directory: str | PathLike[str]) -> list[Path]:
    """The complete bundles in a directory, oldest first; damaged ones are not among them.

    Args:
        directory: Where the bundles of a run are; it need not exist.

    Returns:
        Their directories.
    """
    return [each.path for each in _stored(Path(directory)) if each.complete]


def make_room(
    directory: str | PathLike[str],
    needed: int,
    *,
    max_bundles: int = 16,
    max_bytes: int = 4 << 30,
    runs: Collection[str] | None = None,
) -> bool:
    """Remove bundles so that one more fits, if it can: the first ones of a run and the newest stay.

    What went wrong first is most often the cause of the rest, and what went wrong last is what one looks for. So the
    first half of the bundles, as far as they take no more than half of the bytes, but always the very first, is never
    removed; among the others the oldest makes room, after those that are damaged. Nothing is removed if that is not
    enough. What killed processes left unfinished is removed first.

    Args:
        directory: Where the bundles of a run are; it need not exist.
        needed: Bytes of the next one, about.
        max_bundles: How many there may be, with the next one, >= 1. Default 16.
        max_bytes: How many bytes they may take, with the next one, >= 1. Default 4 GiB.
        runs: The names of the run and of those that it goes on from. Where several runs share the directory, bundles
            of others neither count nor are removed. Default None: all are the run's.

    Returns:
        Whether the next one fits.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of its range.

    Example:
        >>> make_room("bundles", needed=100 << 20), make_room("bundles", needed=5 << 30)
        (True, False)
    """
    check_integer("needed", needed, at_least=0)
    check_integer("max_bundles", max_bundles, at_least=1)
    check_integer("max_bytes", max_bytes, at_least=1)
    remove_leftovers(directory)
    stored = [each for each in _stored(Path(directory)) if runs is None or each.run is None or each.run in runs]
    kept = _first_half([each for each in stored if each.complete], max_bundles, max_bytes)
    replaceable = [each for each in stored if each not in kept]
    number, size = len(stored), sum(each.size for each in stored)
    removed = []
    while number + 1 > max_bundles or size + needed > max_bytes:
        if not replaceable:
            return False
        removed.append(replaceable.pop(0))
        number, size = number - 1, size - removed[-1].size
    for each in removed:
        with suppress(FileNotFoundError):
            remove_atomically(each.path)
    return True


def tensor_bytes(value: Any) -> int:
    """The bytes of all tensors and arrays in a batch or state, in any nesting: about what it takes on the disk.

    Example:
        >>> import torch
        >>> tensor_bytes([{"x": torch.zeros(10)}, (torch.zeros(2, dtype=torch.int64), "label")])
        56
    """
    return sum(leaf.nbytes for _, leaf in named_leaves(value, "") if isinstance(leaf, (Tensor, np.ndarray)))


class _Stored(NamedTuple):
    path: Path
    written: int
    size: int
    complete: bool
    run: str | None


def _stored(directory: Path) -> list[_Stored]:
    """The bundles in a directory: damaged ones, then complete ones, oldest first."""
    found = []
    for manifest in directory.glob("step=*/manifest.json"):
        path = manifest.parent
        with suppress(FileNotFoundError):  # another process has removed it meanwhile
            size = tree_bytes(path)
            try:
                manifest_of = read_manifest(path)
                found.append(_Stored(path, manifest_of.written, size, True, manifest_of.run))
            except BundleError:
                if path.exists():
                    found.append(_Stored(path, 0, size, False, None))
    return sorted(found, key=lambda each: (each.written, each.path))


def _first_half(stored: Sequence[_Stored], max_bundles: int, max_bytes: int) -> set[_Stored]:
    sizes = accumulate(each.size for each in stored)
    first = zip(stored[: -(-max_bundles // 2)], sizes, strict=False)
    return {each for index, (each, size) in enumerate(first) if index == 0 or size <= max_bytes / 2}
