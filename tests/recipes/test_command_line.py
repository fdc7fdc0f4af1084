from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback, Timer

from recipes._callback_set import CallbackSet
from recipes._command_line import from_command_line, one_line, quiet

CONFIG = """
size: 3
callbacks:
  monitor:
    class_path: lightning.pytorch.callbacks.LearningRateMonitor
  guard:
    class_path: stability_callbacks.StepGuard
  clipping:
    class_path: stability_callbacks.GradientClipping
    init_args:
      rule:
        class_path: stability_callbacks.clipping.NormClip
        init_args:
          max_norm: 2.0
  initialization:
    class_path: stability_callbacks.Initialization
    init_args:
      policy:
        class_path: stability_callbacks.initialization.Recurrent
        init_args:
          forget_bias: 2.0
"""


@dataclass
class Recipe:
    """Show something.

    Args:
        size: How big it is.
        callbacks: What helps.
        strict: Refuse it.
    """

    size: PositiveInt
    callbacks: CallbackSet
    strict: bool = False

    def __post_init__(self) -> None:
        if self.strict:
            raise ValueError("`strict` was asked for")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "thing.yaml"
    path.write_text(CONFIG)
    return path


def names(callbacks: list[Callback]) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def test_defaults_come_from_the_file(config: Path) -> None:
    recipe = from_command_line(Recipe, config, [])
    assert recipe.size == 3
    assert names(recipe.callbacks.fresh()) == ["LearningRateMonitor", "Initialization", "GradientClipping", "StepGuard"]
    assert recipe.callbacks.initialization.policy.forget_bias == 2.0  # type: ignore[union-attr]


def test_any_part_can_be_changed_by_an_option_or_a_file(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("callbacks: {initialization: {init_args: {policy: {init_args: {forget_bias: 5.0}}}}}")
    options = [
        f"--config={other}",
        "--callbacks.guard=null",
        "--callbacks.initialization.verbose=false",
        "--callbacks.monitor.logging_interval=step",
        "--callbacks.more=[lightning.pytorch.callbacks.Timer]",
    ]
    recipe = from_command_line(Recipe, config, options)
    assert recipe.callbacks.initialization.policy.forget_bias == 5.0  # type: ignore[union-attr]
    assert recipe.callbacks.initialization.verbose is False  # type: ignore[union-attr]
    assert recipe.callbacks.monitor.logging_interval == "step"  # type: ignore[union-attr]
    assert names(recipe.callbacks.fresh()) == ["LearningRateMonitor", "Initialization", "GradientClipping", "Timer"]


def test_each_run_gets_callbacks_of_its_own() -> None:
    callbacks = CallbackSet(more=[Timer()])
    assert callbacks.fresh()[0] is not callbacks.fresh()[0]
    assert callbacks.fresh()[0] is not callbacks.more[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus", "3"], "unrecognized arguments: --bogus 3"),
        (["--size", "x"], "size"),
        (["--size", "0"], "size: Not of type PositiveInt: 0"),
        (["--callbacks.guard.max_consecutive_skips", "x"], "callbacks.guard.max_consecutive_skips: expected int"),
        (["--callbacks.guard.nope", "1"], "callbacks.guard: Option 'nope' is not accepted"),
        (["--callbacks.guard", "no.Such"], "callbacks.guard: No module named 'no'"),
        (["--callbacks.clipping.rule.max_norm=-1"], "`max_norm` must be a number > 0, got -1"),
        (["--config", "missing.yaml"], "File does not exist"),
        (["--strict", "true"], "`strict` was asked for"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        from_command_line(Recipe, config, arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("python -m recipes.thing: error: ")
    assert words in line
    assert "Namespace" not in line


def test_help_names_each_option_its_meaning_and_its_default(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        from_command_line(Recipe, config, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--size SIZE How big it is. (default: 3)" in text
    assert "(default: GradientClipping(rule=NormClip(max_norm=2.0)))" in text
    assert "(default: Initialization(policy=Recurrent(forget_bias=2.0)))" in text
    assert "(default: StepGuard())" in text
    assert "class_path" not in text


def test_one_line_keeps_the_definite_reason_only() -> None:
    message = """Parser key "a":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'x.Y'>, <class 'NoneType'>]
      Errors:
        - Problem with given class_path 'x.Y':
            Parser key "b":
              `b` must be positive
        - Expected a <class 'NoneType'>
      Given value type: <class 'str'>
      Given value: Namespace(b=1)"""
    assert one_line(message) == "a.b: `b` must be positive"


def test_quiet_hides_tips_not_warnings_and_puts_everything_back(caplog: pytest.LogCaptureFixture) -> None:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "stability_callbacks")]
    for logger in loggers:
        caplog.set_level(logging.INFO, logger.name)
    with quiet():
        assert [logger.getEffectiveLevel() for logger in loggers] == [logging.WARNING, logging.ERROR]
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)
    assert [logger.level for logger in loggers] == [logging.INFO, logging.INFO]
