"""The line of the user's code that runs now."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

__all__ = ["SourceLine", "calling_line", "is_users"]

_NOT_THE_USERS = {
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_utilities",
    "stability_callbacks",
    "contextlib",
    "functools",
}


class SourceLine(NamedTuple):
    """A line of code; as a string, with its text: ``model.py:42 in forward: `y = x.log()```."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        path = Path(self.file)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        text = linecache.getline(self.file, self.line).strip()
        return f"{shown}:{self.line} in {self.function}" + (f": `{text}`" if text else "")


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs code of the user's: neither PyTorch's, Lightning's, nor this package's."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] not in _NOT_THE_USERS


def calling_line(stop: str) -> SourceLine | None:
    """The innermost line of code on the stack that belongs neither to PyTorch, Lightning, nor this package.

    Args:
        stop: Name of a module: what called it is not looked at.

    Returns:
        The line; None where there is none inside of ``stop``.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == stop:
            return None
        if is_users(frame):
            return SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return None
