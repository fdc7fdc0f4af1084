from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback, Timer

from recipes.runner._callback_set import CallbackSet
from recipes.runner._command_line import from_command_line, quiet, scenarios_from_command_line
from tests.recipes.tiny import CONFIGS

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
            raise ValueError("`strict` was asked for") from KeyError("a reason of its own")


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
        (["--bogus", "3"], "--bogus 3"),
        (["--size", "x"], "size"),
        (["--size", "0"], "size"),
        (["--callbacks.guard.max_consecutive_skips", "x"], "max_consecutive_skips"),
        (["--callbacks.guard.nope", "1"], "nope"),
        (["--callbacks.guard", "no.Such"], "no.Such"),
        (["--callbacks.guard", "torch.nn.ReLU"], "callbacks.guard"),
        (["--callbacks.clipping.rule.max_norm=-1"], "error: `max_norm` must be a number > 0, got -1"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--strict", "true"], "error: `strict` was asked for (--help"),
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


# ---- scenarios

TINY = CONFIGS / "tiny.yaml"
ROOT = Path(__file__).parents[3]
RECIPES = ["lstm", "mlp", "resnet", "transformer"]


def options(tmp_path: Path, *argv: str) -> list[str]:
    return [f"--output={tmp_path}", *argv]


def test_a_scenario_is_what_its_file_changes(tmp_path: Path) -> None:
    clean, poisoned = scenarios_from_command_line(TINY, options(tmp_path))
    assert (clean.scenario, clean.poison) == ("clean", None)
    assert poisoned.scenario == "poisoned"
    assert poisoned.poison is not None
    assert poisoned.poison.one_in == 8
    (alone,) = scenarios_from_command_line(TINY, options(tmp_path, "--scenario", "poisoned"))
    assert alone.poison == poisoned.poison


def test_no_options_at_all_mean_every_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [recipe.scenario for recipe in scenarios_from_command_line(TINY, [])] == ["clean", "poisoned"]
    assert (tmp_path / "runs" / "tiny").is_dir()


def test_options_of_one_class_may_be_left_to_another(tmp_path: Path) -> None:
    argv = options(tmp_path, "--scenario=clean", "--data=tests.recipes.tiny.Batched")  # the file says batch_size: 64
    (recipe,) = scenarios_from_command_line(TINY, argv)
    assert "batch_size: 64" in recipe.settings


def test_options_and_files_reach_every_scenario(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("goal: {threshold: 0.25}\ndata: {init_args: {batch_size: 16}}")
    argv = options(tmp_path, f"--config={other}", "--goal.mode=min", "--data.batch_size=8", "--poison.one_in=5")
    for recipe in scenarios_from_command_line(TINY, argv):
        assert (recipe.goal.threshold, recipe.goal.mode) == (0.25, "min")
        assert recipe.data.batch_size == 8  # type: ignore[attr-defined]
        assert recipe.poison is not None
        assert recipe.poison.one_in == 5


def test_a_file_may_choose_the_scenario(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("scenario: poisoned")
    (recipe,) = scenarios_from_command_line(TINY, options(tmp_path, f"--config={other}"))
    assert recipe.scenario == "poisoned"
    (recipe,) = scenarios_from_command_line(TINY, options(tmp_path, f"--config={other}", "--scenario=clean"))
    assert recipe.scenario == "clean"


@pytest.mark.parametrize(
    ("argv", "ablate"), [([], False), (["--ablate"], True), (["--ablate", "true"], True), (["--ablate=false"], False)]
)
def test_flags_need_no_value(tmp_path: Path, argv: list[str], ablate: bool) -> None:
    recipe, _ = scenarios_from_command_line(TINY, options(tmp_path, *argv, "--seed", "3", "--seeds=2"))
    assert recipe.ablate is ablate
    assert list(recipe.seeds) == [3, 4]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scenario=everything"], "scenario: expected clean, poisoned, all; got everything"),
        (["--scenario"], "--scenario"),
        (["--variant=ill"], "variant"),
        (["--seed=-1"], "seed"),
        (["--seeds=0"], "seeds"),
        (["--optimizer.lr=fast"], "fast"),
        (["--optimizer.lr=-1"], "Invalid learning rate"),
        (["--model.width=x"], "width"),
        (["--model.depth=3"], "depth"),
        (["--trainer.max_steps=many"], "max_steps"),
        (["--trainer.accelerator=abacus"], "abacus"),
        (["--poison.one_in=0"], "error: `one_in` must be an integer >= 1, got 0 (--help"),
        (["--poison.kind=arsenic"], "arsenic"),
        (["--goal.mode=most"], "goal.mode"),
        (["--data=no.Such"], "no.Such"),
        (["--output=/dev/null"], "/dev/null"),
    ],
)
def test_wrong_scenario_options_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        scenarios_from_command_line(TINY, options(tmp_path, *argv))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m recipes.tiny: error: ")
    assert words in line
    assert "Namespace" not in line


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_every_recipe_explains_every_option(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    config = ROOT / "configs" / f"{recipe}.yaml"
    with pytest.raises(SystemExit) as stop:
        scenarios_from_command_line(config, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 170
    assert "class_path" not in text
    scenarios = [path.stem for path in sorted(config.with_suffix("").glob("*.yaml"))]
    assert f"Scenarios: {', '.join([*scenarios, 'all'])};" in " ".join(text.split())
    entries = [" ".join(entry.split()) for entry in text.split("\n  --")[1:]]
    assert len(entries) > 25
    for entry in entries:
        # The option and its placeholder, then words that explain it.
        explanation = entry.partition(" (default")[0].split()[2:]
        assert explanation or entry.startswith("print_config"), entry


@pytest.mark.parametrize("option", ["--help", "--model.help=tests.recipes.tiny.TinyNet"])
def test_a_class_explains_its_options(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as stop:
        scenarios_from_command_line(TINY, [option])
    assert stop.value.code == 0
    assert "Hidden units." in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_scenario_of_every_recipe_can_be_made_and_keeps_its_name(recipe: str, tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{recipe}.yaml"
    made = scenarios_from_command_line(config, options(tmp_path))
    assert [one.scenario for one in made] == [path.stem for path in sorted(config.with_suffix("").glob("*.yaml"))]
    for one in made:
        # The plain variant only watches; what heals is the list of callbacks alone.
        assert not one.callbacks["plain"].ablations()
        assert one.callbacks["healed"].ablations()


@pytest.mark.parametrize(
    ("recipe", "path"),
    [
        ("mlp", "recipes.mlp.DeepMLP"),
        ("resnet", "recipes.resnet.ConvNet"),
        ("lstm", "recipes._recurrent.PixelRNN"),
        ("lstm", "recipes.lstm.PixelRNN"),
        ("transformer", "recipes.transformer.CharTransformer"),
    ],
)
def test_the_class_paths_of_older_configurations_still_load(recipe: str, path: str, tmp_path: Path) -> None:
    older = tmp_path / "config.yaml"
    older.write_text(f"scenario: poisoned\nmodel: {{class_path: {path}}}")
    config = ROOT / "configs" / f"{recipe}.yaml"
    (made,) = scenarios_from_command_line(config, options(tmp_path, f"--config={older}"))
    (today,) = scenarios_from_command_line(config, options(tmp_path, "--scenario=poisoned"))
    assert made.settings == today.settings


@pytest.mark.parametrize("override", ["precision/bf16-mixed", "precision/64-true", "strategy/ddp", "strategy/fsdp2"])
def test_small_overrides_change_the_trainer_and_keep_its_other_options(override: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / f"{override}.yaml"
    (recipe,) = scenarios_from_command_line(TINY, options(tmp_path, f"--config={path}", "--scenario=clean"))
    trainer = recipe.make_trainer(callbacks=[], logger=[])
    assert trainer.max_steps == 20
    kind, _, name = override.partition("/")
    if kind == "precision":
        assert trainer.precision == name
    else:
        assert trainer.num_devices == 2
        assert type(trainer.strategy).__name__ == {"ddp": "DDPStrategy", "fsdp2": "ModelParallelStrategy"}[name]


def test_what_is_wrong_in_a_file_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number, (content, words) in enumerate(
        {
            "model: {init_args: {width: wide}}": "wide",
            "healed: {guard: {init_args: {max_consecutive_skips: many}}}": "max_consecutive_skips",
            "mdel: 3": "mdel",
            "model: [": "",
        }.items()
    ):
        other = tmp_path / f"{number}.yaml"
        other.write_text(content)
        with pytest.raises(SystemExit) as stop:
            scenarios_from_command_line(TINY, options(tmp_path, f"--config={other}"))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m recipes.tiny: error: ")
        assert words in line
        assert "Namespace" not in line


def test_a_wrong_option_of_an_object_is_told_without_the_objects_around_it(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        from_command_line(Recipe, config, ["--callbacks.clipping.rule.norm_type=round"])
    line = capsys.readouterr().err
    assert "norm_type" in line
    assert "GradientClipping" not in line
    assert "NormClip" not in line


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
