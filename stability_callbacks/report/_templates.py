"""The templates of the page. Whatever they are given is escaped, unless it was rendered by one of them."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stability_callbacks.diagnosis import KINDS
from stability_callbacks.report._scale import number

__all__ = ["Markup", "kind_class", "prose", "render"]

_CODE = re.compile(r"`([^`]+)`")


def render(name: str, **values: object) -> Markup:
    """Fill in a template.

    Args:
        name: Its file in ``templates/``.
        values: What it is given: texts, which are escaped, and what other templates made, which is not.

    Returns:
        The markup.

    Raises:
        jinja2.UndefinedError: If the template uses a value that it was not given.

    Example:
        >>> print(render("kinds.css", kinds=[]).splitlines()[0])
        :root {
    """
    return Markup(_environment.get_template(name).render(**values))


def prose(text: str) -> Markup:
    """A text in which backticks mark code.

    Example:
        >>> print(prose("use `a < b`"))
        use <code>a &lt; b</code>
    """
    parts = enumerate(_CODE.split(text))
    return Markup().join(Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in parts)


def kind_class(kind: str) -> str:
    """The class that gives a kind its color; with two hyphens before it, the custom property that holds the color."""
    return f"kind-{kind.replace(' ', '-')}" if kind in KINDS else "other-kind"


_environment = Environment(
    loader=PackageLoader("stability_callbacks.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
_environment.filters |= {"kind_class": kind_class, "number": number, "prose": prose, "thousands": "{:,}".format}
