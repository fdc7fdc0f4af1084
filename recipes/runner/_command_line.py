"""The command line of a recipe: made from its constructor, defaults from a YAML file, errors in one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from argparse import Action, HelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from recipes.runner._recipe import Recipe

__all__ = ["from_command_line", "quiet", "scenarios_from_command_line"]

T = TypeVar("T")

ALL = "all"
SELECTION = ("config", "seed", "seeds", "variant", "ablate", "resume", "output")
"""Options that choose which runs to make, not what a run is."""
FLAGS = ("--ablate", "--resume")
WRONG_USE = (TypeError, ValueError, OSError, MisconfigurationException)
CLASSES = ("model", "data")
"""Options whose default class is explained by --help, option by option."""

OBJECTS = """\
Scenarios: {scenarios}; the defaults below are those of "{scenario}". An option that takes an object accepts a class,
and that class's arguments as options of their own: --optimizer torch.optim.Adam --optimizer.lr 0.001
--trainer.max_steps 1000 (--optimizer.help torch.optim.Adam lists them). """

FILES = "All options can stand in a YAML file (--config FILE); --print_config shows one that is complete."


def from_command_line(recipe: Callable[..., T], config: Path, argv: Sequence[str] | None = None) -> T:
    """Make an object from the command line.

    Every constructor argument is an option, documented by the docstring. Defaults come from ``config``; a file given
    with ``--config`` overrides them, and options override both.

    Raises:
        SystemExit: With code 2, after one line on standard error, if an option or a value is wrong.
    """
    parser = _parser(recipe, config.stem, [config])
    return _make(recipe, parser, parser.parse_args(argv))


def scenarios_from_command_line(config: Path, argv: Sequence[str] | None = None) -> list[Recipe]:
    """Make a recipe for each scenario that the command line asks for.

    The scenarios are the files of the folder named like ``config``: each holds what differs from ``config``. Options
    apply to every scenario chosen.

    Raises:
        SystemExit: With code 2, after one line on standard error, if an option or a value is wrong.
    """
    argv = _with_values(sys.argv[1:] if argv is None else argv)
    files = {path.stem: path for path in sorted(config.with_suffix("").glob("*.yaml"))}
    asked = _scenario_asked(argv)
    if asked not in (*files, ALL):
        _parser(Recipe, config.stem, [config]).error(f"scenario: expected {', '.join([*files, ALL])}; got {asked}")
    if asked == ALL and any(word.startswith("--print_config") for word in argv):
        _parser(Recipe, config.stem, [config]).error("print_config shows one scenario: choose it with --scenario")
    recipes = []
    for name in files if asked == ALL else [asked]:
        parser = _parser(
            Recipe,
            config.stem,
            [config, files[name]],
            OBJECTS.format(scenarios=", ".join([*files, ALL]), scenario=name),
        )
        options = parser.parse_args(argv)
        options["scenario"] = name
        recipes.append(_make(Recipe, parser, options))
        try:
            recipes[-1].record(_settings(parser, options))
            recipes[-1].rehearse()
        except WRONG_USE as error:
            parser.error(str(error))
    return recipes


def _with_values(argv: Sequence[str]) -> list[str]:
    """Let ``--ablate`` stand for ``--ablate=true``."""
    return [
        f"{word}=true" if word in FLAGS and following.lower() not in ("true", "false") else word
        for word, following in zip(argv, [*argv[1:], ""], strict=False)
    ]


def _scenario_asked(argv: Sequence[str]) -> str:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--scenario", nargs="?")
    peek.add_argument("--config", action="append", default=[], nargs="?")
    known, _ = peek.parse_known_args(argv)
    asked = ALL
    for path in filter(Path.is_file, map(Path, filter(None, known.config))):
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):  # the parser will say what is wrong with it
            continue
        asked = content.get("scenario", asked) if isinstance(content, dict) else asked
    return str(known.scenario or asked)


def _parser(recipe: Callable[..., Any], name: str, defaults: Iterable[Path], preface: str = "") -> _Parser:
    parser = _Parser(
        prog=f"python -m recipes.{name}",
        usage="%(prog)s [options]",
        description=preface + FILES,
        default_config_files=[os.path.relpath(path) for path in defaults],
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with options; may be given several times.")
    parser.add_class_arguments(recipe)
    return parser


def _settings(parser: _Parser, options: Namespace) -> str:
    """What makes a run what it is, as a file that --config takes."""
    kept = options.clone()
    for name in SELECTION:
        kept.pop(name, None)
    _make_plain(kept)
    return str(parser.dump(kept, skip_none=False, skip_validation=True))


def _make_plain(options: Namespace) -> None:
    """Turn restricted numbers, such as PositiveInt, into those that YAML knows; one may come from another class."""
    for key, value in vars(options).items():
        if isinstance(value, Namespace):
            _make_plain(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(options, key, int(value) if isinstance(value, int) else float(value))


def _make(recipe: Callable[..., T], parser: _Parser, options: Namespace) -> T:
    try:
        arguments = parser.instantiate(options)
        arguments.pop("config")
        return recipe(**arguments)
    except WRONG_USE as error:
        parser.error(str(_own(error)))


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the screen to the recipe: no tips of Lightning's, no line for each skipped step. Errors still show."""
    levels = {"lightning.pytorch": logging.WARNING, "stability_callbacks": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message="FaultInjector puts faults into this training on purpose")
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
        if not self.exit_on_error:  # the parser of an object that is an option's value; the outermost one reports
            super().error(message, ex)
        reason = " ".join(_innermost(message, ex).split())
        self.exit(2, f"{self.prog}: error: {reason} (--help lists the options)\n")

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        defaults = self.get_defaults()
        for action in self._actions:
            if default := _short(defaults.get(action.dest)):
                action.help = f"{action.help} (default: {default})"
        return super().format_help(formatter) + "".join(_options_of(name, defaults.get(name)) for name in CLASSES)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _innermost(message: str, error: Exception | None) -> str:
    """What the innermost parser says: those around it repeat it, with every type that the value might have had."""
    return [message, *(str(each) for each in _causes(error) if isinstance(each, argparse.ArgumentError))][-1]


def _own(error: Exception) -> BaseException:
    """What a constructor raised, without what jsonargparse raised around it because of that."""
    return next((each for each in _causes(error) if not _raised_by_jsonargparse(each)), error)


def _raised_by_jsonargparse(error: BaseException) -> bool:
    modules = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith("jsonargparse.")


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
    if isinstance(value, list) and value:
        return f"[{', '.join(map(_short, value))}]"
    if not isinstance(value, dict):
        return str(value) if value not in (None, []) else ""
    if "class_path" not in value:  # a group, whose members show their own
        return ""
    kind = _imported(value["class_path"])
    parameters = signature(kind).parameters
    changed = (
        f"{key}={_short(argument)}"
        for key, argument in value.get("init_args", {}).items()
        if argument is not None and parameters[key].default != argument
    )
    return f"{kind.__name__}({', '.join(changed)})"


def _options_of(name: str, default: Any) -> str:
    """The options of the class that an option takes by default, for the end of the help."""
    if not isinstance(default, Namespace) or "class_path" not in default:
        return ""
    kind = _imported(default.class_path)
    given = default.init_args.as_dict() if "init_args" in default else {}
    # What is left out has no default: the recipe gives it.
    left_out = {key for key, value in signature(kind).parameters.items() if value.default is value.empty} - given.keys()
    parser = ArgumentParser(usage=argparse.SUPPRESS, formatter_class=_Formatter, add_help=False)
    parser.add_class_arguments(kind, name, skip=left_out)
    for action in parser._actions:
        value = given.get(action.dest.removeprefix(f"{name}."), action.default)
        action.help = argparse.SUPPRESS if action.dest == name else f"{action.help} (default: {value})"
    return f"\n--{name} {kind.__name__}: {parser.format_help()}"


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
