"""The command line of a recipe: made from its constructor, defaults from a YAML file, errors in one line."""

from __future__ import annotations

import logging
import os
import re
import warnings
from argparse import Action, HelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["from_command_line", "one_line", "quiet"]

Recipe = TypeVar("Recipe")

HINT = """\
An option that takes an object accepts a class, and that class's arguments as options of their own:
--optimizer torch.optim.Adam --optimizer.lr 0.001 --trainer.max_steps 1000 (--optimizer.help torch.optim.Adam lists
them). All of it can stand in a YAML file instead (--config FILE); --print_config shows one that is complete."""

_NOISE = (
    r'Parser key "[^"]+":',
    r"Does not validate against any of the Union subtypes",
    r"Subtypes: \[.*\]",
    r"Errors:",
    r"Given value type: .*",
    r"Given value: (?:Namespace|NestedArg)\(.*",
    r"\.? Got value: Namespace\(.*",
    r"Type \S+(?:\[.*\])? expects a function or a callable class:",
    r"Type <class '.*'> expects a function or a callable class:",
    r"Problem with given class_path '.*':",
)


def from_command_line(recipe: type[Recipe], config: Path, argv: Sequence[str] | None = None) -> Recipe:
    """Make a recipe from the command line.

    Every constructor argument is an option, documented by the docstring. Defaults come from ``config``; a file given
    with ``--config`` overrides them, and options override both.

    Raises:
        SystemExit: With code 2, after one line on standard error, if an option or a value is wrong.
    """
    parser = _Parser(
        prog=f"python -m recipes.{config.stem}",
        usage="%(prog)s [options]",
        description=HINT,
        default_config_files=[os.path.relpath(config)],
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with options; may be given several times.")
    parser.add_class_arguments(recipe)
    options = parser.parse_args(argv)
    try:
        arguments = parser.instantiate(options)
        arguments.pop("config")
        return recipe(**arguments)
    except (TypeError, ValueError, OSError, MisconfigurationException) as error:
        parser.error(str(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the screen to the recipe: no tips of Lightning's, no line for each skipped step. Errors still show."""
    levels = {"lightning.pytorch": logging.WARNING, "stability_callbacks": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning.pytorch.utilities._pytree")
        try:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a nested object: the outermost one reports, it knows the full name
            super().error(message, ex)
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the options)\n")

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        defaults = self.get_defaults()
        for action in self._actions:
            if default := _short(defaults.get(action.dest)):
                action.help = f"{action.help} (default: {default})"
        return super().format_help(formatter)


class _Formatter(DefaultHelpFormatter):
    """Help that fits a screen: defaults in short, and no list of every class that would do."""

    def add_argument(self, action: Action) -> None:
        if not action.dest.endswith(".help"):
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""


def _short(value: Any) -> str:
    """A default as Python code, without the arguments that have their class's own default; empty if there is none."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, dict):
        return str(value) if value not in (None, []) else ""
    if "class_path" not in value:  # a group, whose members show their own
        return ""
    module, _, name = value["class_path"].rpartition(".")
    parameters = signature(getattr(import_module(module), name)).parameters
    changed = (
        f"{key}={_short(argument)}"
        for key, argument in value.get("init_args", {}).items()
        if argument is not None and parameters[key].default != argument
    )
    return f"{name}({', '.join(changed)})"


def one_line(message: str) -> str:
    """Condense jsonargparse's account of every alternative it tried into the option's name and what is wrong with it.

    Example:
        >>> one_line('Parser key "poison":\\n  Parser key "one_in":\\n    Expected a <class "int">. Got value: x')
        'poison.one_in: expected int; got x'
    """
    option = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    for noise in _NOISE:
        message = re.sub(noise, "", message)
    message = re.sub(r"Expected an? (?:<class ['\"](?:\w+\.)*(\w+)['\"]>|typing\.)?", r"expected \1", message)
    message = re.sub(r"\.? ?(?:Got|Given) value: ", "; got ", message)
    reasons = list(dict.fromkeys(line.strip(" -;") for line in message.splitlines() if line.strip(" -;")))
    # Beside a definite reason, the other types an option might have had are of no interest.
    definite = [reason for reason in reasons if not reason.startswith(("expected", "got"))]
    return ": ".join(filter(None, (option, "; ".join(definite or reasons))))
