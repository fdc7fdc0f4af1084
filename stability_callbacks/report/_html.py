"""HTML that is escaped by construction."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["Html", "join", "prose", "tag"]

_CODE = re.compile(r"`([^`]+)`")


class Html(str):
    """Text that is markup already. All other text is escaped where it becomes part of some."""

    __slots__ = ()


def tag(name: str, /, *content: str, **attributes: str | float | None) -> Html:
    """An element. Text in it and in its attributes is escaped.

    Args:
        name: The element's name.
        content: What is in it, in order.
        attributes: Its attributes; underscores stand for hyphens, one at the end is dropped, None leaves one out.

    Returns:
        The element.

    Example:
        >>> tag("p", "a < b, ", tag("b", "c"), class_="note", hidden=None)
        '<p class="note">a &lt; b, <b>c</b></p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{written}>"
    return Html(opening if name in _VOID else f"{opening}{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Parts one after the other, escaped where they are not markup.

    Example:
        >>> join(["<b>", Html("<br>")])
        '&lt;b&gt;<br>'
    """
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def prose(text: str) -> Html:
    """A text in which backticks mark code.

    Example:
        >>> prose("use `a < b`")
        'use <code>a &lt; b</code>'
    """
    return join(tag("code", part) if place % 2 else part for place, part in enumerate(_CODE.split(text)))


_VOID = {"meta", "br", "img"}
