from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes._poison import Poison
from recipes.lstm import main

STEPS = 12
SHORT = [
    f"--trainer.max_steps={STEPS}",
    "--hidden_size=16",
    "--poison.one_in=4",
    "--poison.first_step=4",
    "--healed.schedule.schedule.warmup=3",
    "--plain.monitor.histogram_every_n_steps=5",
    "--healed.monitor.histogram_every_n_steps=5",
]
HITS = [step for step in range(STEPS) if Poison(one_in=4, first_step=4).hits(step, seed=0)]


@dataclass
class Demo:
    """A short run of the recipe: what it returned, printed and wrote."""

    code: int
    screen: str
    output: Path

    @property
    def results(self) -> list[dict[str, Any]]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        records: list[dict[str, Any]] = json.loads((self.output / "results.json").read_text(), parse_constant=refuse)
        return records

    def events(self, run: str) -> EventAccumulator:
        return EventAccumulator(str(self.output / run)).Reload()


def demonstrate(output: Path, *options: str) -> Demo:
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        code = main([*SHORT, f"--output={output}", *options])
    return Demo(code, screen.getvalue(), output)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return demonstrate(tmp_path_factory.mktemp("lstm") / "runs", "--accuracy=0.0", "--tolerance=1.0")


def test_every_scenario_and_variant_is_in_the_results(demo: Demo) -> None:
    assert [(record["scenario"], record["variant"]) for record in demo.results] == [
        ("exploding", "plain"),
        ("exploding", "healed"),
        ("clean", "healed"),
        ("poisoned", "plain"),
        ("poisoned", "healed"),
    ]
    for record in demo.results:
        assert list(record) == ["scenario", "variant", "seed", "metric", "value", "success", "seconds"]
        assert (record["seed"], record["metric"]) == (0, "accuracy")
        assert 0 <= record["value"] <= 1
        assert record["seconds"] > 0


def test_poison_kills_the_plain_run_and_is_skipped_by_the_guarded_one(demo: Demo) -> None:
    assert f"dead at step {HITS[0]}" in demo.screen
    skips = demo.events("poisoned-healed").Scalars("stability/skipped_steps")
    assert skips[-1].value == len(HITS) == 2
    assert [event.step for event, before in zip(skips[1:], skips, strict=False) if event.value > before.value] == HITS
    (row,) = [line for line in demo.screen.splitlines() if line.startswith("poisoned   healed")]
    assert f" {len(HITS)} " in row


@pytest.mark.parametrize("run", ["exploding-plain", "exploding-healed", "poisoned-plain", "poisoned-healed"])
def test_tensorboard_gets_curves_of_every_step_and_histograms(demo: Demo, run: str) -> None:
    events = demo.events(run)
    for tag in ("train/loss", "grad_norm/total", "grad_norm/lstm"):
        assert [event.step for event in events.Scalars(tag)] == list(range(STEPS))
    assert events.Histograms("gradients/lstm.weight_hh_l0")


def test_both_variants_start_from_the_same_weights_and_batches(demo: Demo) -> None:
    # Without its initialisation the healed model is the plain one until the first step.
    healed = demonstrate(demo.output.with_name("same"), "--scenarios=exploding", "--healed.initialization=null")
    first = [healed.events(f"exploding-{variant}").Scalars("train/loss")[0].value for variant in ("plain", "healed")]
    assert first[0] == first[1] == demo.events("exploding-plain").Scalars("train/loss")[0].value


def test_screen_and_picture(demo: Demo) -> None:
    assert demo.code == 0
    assert "exploding · plain" in demo.screen
    assert f"{STEPS}/{STEPS}" in demo.screen
    assert f"tensorboard --logdir {demo.output}" in demo.screen
    assert (demo.output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    for seed in (0, 1):
        demo = demonstrate(tmp_path, "--scenarios=poisoned", f"--seed={seed}")
    assert {record["seed"] for record in demo.results} == {1}
    assert [record["scenario"] for record in demo.results] == ["clean", "poisoned", "poisoned"]
    assert len(demo.events("poisoned-plain").Scalars("train/loss")) == STEPS


def test_a_missed_goal_is_a_failure(tmp_path: Path) -> None:
    demo = demonstrate(tmp_path, "--scenarios=exploding", "--accuracy=1.0")
    assert demo.code == 1
    assert "The healed run of scenario 'exploding' missed its goal: accuracy 0." in demo.screen


def test_a_run_that_the_guard_ends_is_reported(tmp_path: Path) -> None:
    poison = ["--poison.one_in=1", "--healed.guard.max_consecutive_skips=3"]
    demo = demonstrate(tmp_path, "--scenarios=poisoned", "--tolerance=0.0", *poison, "--seed=3")
    assert "stopped by guard" in demo.screen
    assert demo.results[-1]["value"] is not None


def test_a_run_too_short_for_the_poison_says_so(demo: Demo) -> None:
    assert "No batch was poisoned" not in demo.screen
    short = demonstrate(demo.output.with_name("short"), "--scenarios=poisoned", "--poison.first_step=100")
    assert "No batch was poisoned" in short.screen


def test_progress_bars_can_be_switched_off(tmp_path: Path) -> None:
    demo = demonstrate(tmp_path, "--scenarios=exploding", "--trainer.enable_progress_bar=false")
    assert f"{STEPS}/{STEPS}" not in demo.screen


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--bogus=1", "unrecognized arguments: --bogus=1"),
        ("--seed=-1", "seed: "),
        ("--scenarios=all_of_them", "scenarios: expected Literal['exploding', 'poisoned', 'all']"),
        ("--optimizer.lr=fast", "optimizer.lr: expected float"),
        ("--optimizer.lr=-1", "Invalid learning rate"),
        ("--trainer.max_steps=many", "trainer.max_steps: expected int"),
        ("--trainer.accelerator=abacus", "abacus"),
        ("--healed.clipping.rule.max_norm=-1", "`max_norm` must be a number > 0"),
        ("--healed.schedule.schedule.warmup=-1", "`warmup`"),
        ("--poison.one_in=0", "`one_in` must be an integer >= 1, got 0"),
        ("--hidden_size=0", "hidden_size: "),
        ("--output=/dev/null", "/dev/null"),
    ],
)
def test_wrong_options_are_told_in_one_line(capsys: pytest.CaptureFixture[str], option: str, words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([option])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m recipes.lstm: error: ")
    assert words in line


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 120
    for option in ("--seed", "--optimizer", "--trainer", "--healed.clipping", "--healed.guard", "--plain.monitor"):
        assert option in text
    assert "class_path" not in text
