"""Parameter names without the segments that wrappers add."""

from __future__ import annotations

__all__ = ["plain_name"]

_WRAPPER_SEGMENTS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name
