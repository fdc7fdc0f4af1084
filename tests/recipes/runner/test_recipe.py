"""The frame of every training recipe: options in, runs, files and exit code out."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import recipes.runner._main
from recipes.data._poison import Poison
from recipes.results._run import Run
from recipes.runner._interruption import InterruptCheckpoint
from recipes.runner._main import run_recipe
from tests.recipes.data.test_images import write_idx
from tests.recipes.runs import run as finished_run
from tests.recipes.tiny import CONFIGS, Outcome

STEPS = 20
HITS = [step for step in range(STEPS) if Poison(one_in=8, first_step=4).hits(step, seed=0)]
QUIET = "--trainer.enable_progress_bar=false"

Recipe = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes.runner._main, "CONFIGS", CONFIGS)
    CtrlC.trainings = 0


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Let Ctrl-C do what it does in a terminal: what a shell starts in the background ignores it, tests included."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(output: Path, *options: str) -> Outcome:
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        code = run_recipe("tiny", [f"--output={output}", *options])
    return Outcome(code, screen.getvalue(), output)


def saved(outcome: Outcome, name: str, seed: int = 0) -> Run:
    return Run.load(outcome.output / name / f"seed-{seed}" / "run.json")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Every scenario and variant, two seeds, and the ablation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes.runner._main, "CONFIGS", CONFIGS)
        return run(tmp_path_factory.mktemp("runs"), "--seeds=2", "--ablate")


def test_results_hold_every_scenario_variant_and_seed(both: Outcome) -> None:
    keys = [(record["scenario"], record["variant"], record["seed"]) for record in both.records()]
    assert keys == [(s, v, n) for s in ("clean", "poisoned") for n in (0, 1) for v in ("plain", "healed")]
    for record in both.records():
        assert list(record) == ["scenario", "variant", "seed", "metric", "value", "success", "seconds"]
        assert record["metric"] == "accuracy"
        assert 0 <= record["value"] <= 1
        assert record["success"] is True
        assert record["seconds"] > 0
    assert both.code == 0


def test_poison_kills_the_plain_variant_and_is_skipped_by_the_healed_one(both: Outcome) -> None:
    assert saved(both, "poisoned-plain").died_at == HITS[0]
    healed = saved(both, "poisoned-healed")
    assert (healed.died_at, healed.skipped_at, healed.skipped_steps) == (None, HITS, len(HITS))
    assert saved(both, "clean-plain").died_at is None


def test_ablation_leaves_out_each_callback_that_acts(both: Outcome) -> None:
    records = both.records("ablation.json")
    left_out = [(record["scenario"], record["without"]) for record in records if record["seed"] == 0]
    assert left_out == [(s, w) for s in ("clean", "poisoned") for w in ("initialization", "clipping", "guard")]
    assert {record["variant"] for record in records} == {"healed"}
    assert saved(both, "poisoned-healed-without-guard").died_at == HITS[0]
    assert saved(both, "poisoned-healed-without-clipping").died_at is None
    # On clean data the guard changes nothing.
    whole, without = saved(both, "clean-healed"), saved(both, "clean-healed-without-guard")
    assert whole.history["train/loss"] == without.history["train/loss"]
    assert "poisoned  without guard" in both.screen


def test_variants_of_a_seed_begin_with_the_same_weights_and_batches(both: Outcome) -> None:
    plain, healed = saved(both, "clean-plain"), saved(both, "clean-healed-without-initialization")
    assert plain.history["train/loss"][0] == healed.history["train/loss"][0]
    other_seed = saved(both, "clean-plain", seed=1)
    assert plain.history["train/loss"][0] != other_seed.history["train/loss"][0]


def test_a_run_depends_on_nothing_but_its_seed(both: Outcome, tmp_path: Path) -> None:
    torch.rand(7)
    alone = run(tmp_path, "--scenario=poisoned", "--variant=healed", "--seed=1", QUIET)
    assert [(record["variant"], record["seed"]) for record in alone.records()] == [("healed", 1)]
    assert saved(alone, "poisoned-healed", 1).history == saved(both, "poisoned-healed", 1).history
    assert f"{STEPS}/{STEPS}" not in alone.screen


def test_screen_tables_and_pictures(both: Outcome) -> None:
    for words in ("poisoned · healed · 1", f"{STEPS}/{STEPS}", "Seeds 0 to 1", "Healed against plain", "contributes"):
        assert words in both.screen
    assert f"tensorboard --logdir {both.output}" in both.screen
    assert (both.output / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = (both.output / "summary.md").read_text()
    assert summary.count("\n| --- |") == 3
    assert "| poisoned | healed |" in summary


def test_tensorboard_gets_every_step(both: Outcome) -> None:
    events = EventAccumulator(str(both.output / "poisoned-healed" / "seed-1")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS))
    assert events.Scalars("grad_norm/total")
    assert events.Scalars("val/accuracy")


def test_the_settings_of_a_run_are_a_config_that_makes_it_again(both: Outcome, tmp_path: Path) -> None:
    settings = both.output / "poisoned-healed" / "seed-0" / "config.yaml"
    again = run(tmp_path, f"--config={settings}", "--variant=healed", QUIET)
    assert [record["scenario"] for record in again.records()] == ["poisoned"]
    assert saved(again, "poisoned-healed").history == saved(both, "poisoned-healed").history


def test_a_later_command_replaces_what_an_earlier_one_left(tmp_path: Path) -> None:
    for steps in (6, 4):
        outcome = run(tmp_path, "--scenario=clean", f"--trainer.max_steps={steps}", QUIET)
    assert len(saved(outcome, "clean-plain").history["train/loss"]) == 4
    assert len(list((tmp_path / "clean-plain" / "seed-0").glob("events*"))) == 2  # of training and of the test
    assert not (tmp_path / "ablation.json").exists()


def test_the_validation_split_is_for_choosing(tmp_path: Path, both: Outcome) -> None:
    chosen = run(tmp_path, "--scenario=clean", "--variant=plain", "--split=val", QUIET)
    (record,) = chosen.records()
    assert round(record["value"] * 270, 3) == round(record["value"] * 270)  # of 270 images
    assert record["value"] != both.records()[0]["value"]


def test_a_missed_goal_is_a_failure_and_a_reached_one_of_the_plain_variant_is_told(tmp_path: Path) -> None:
    missed = run(tmp_path, "--scenario=clean", "--goal.threshold=1.0", QUIET)
    assert missed.code == 1
    assert "The healed run of scenario 'clean', seed 0, missed its goal: accuracy 0." in missed.screen
    reached = run(tmp_path, "--scenario=clean", QUIET)
    assert reached.code == 0
    assert "The plain run of scenario 'clean', seed 0, reached the goal: nothing to heal." in reached.screen


def test_a_run_that_the_guard_ends_is_reported(tmp_path: Path) -> None:
    options = ["--poison.one_in=1", "--healed.guard.max_consecutive_skips=3", "--goal.threshold=1.0"]
    ended = run(tmp_path, "--scenario=poisoned", *options, QUIET)
    assert "stopped by guard" in ended.screen
    assert ended.records()[-1]["value"] is not None


def test_a_run_too_short_for_the_poison_says_so(tmp_path: Path, both: Outcome) -> None:
    assert "No batch was poisoned" not in both.screen
    short = run(tmp_path, "--scenario=poisoned", "--poison.first_step=100", QUIET)
    assert "No batch was poisoned" in short.screen


# ---- other people's data


def test_any_data_module_will_do(tmp_path: Path) -> None:
    stranger = ["--data=tests.recipes.tiny.Strangers", "--data.size=7", "--trainer.max_steps=6"]
    outcome = run(tmp_path, "--scenario=poisoned", "--poison.first_step=0", "--poison.one_in=3", *stranger, QUIET)
    assert [record["variant"] for record in outcome.records()] == ["plain", "healed"]
    assert saved(outcome, "poisoned-healed").skipped_steps == 2


def test_the_number_of_outputs_is_read_off_the_targets() -> None:
    from recipes.runner._recipe import _dimensions
    from tests.recipes.tiny import Strangers

    assert _dimensions(Strangers(size=7)) == (torch.Size([7]), 4)
    assert _dimensions(Strangers(integers=False)) == (torch.Size([6]), 5)
    assert _dimensions(Strangers(integers=False, targets=0)) == (torch.Size([6]), 1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_data_module_may_lack_validation_and_ask_the_trainer_and_be_resumed(tmp_path: Path) -> None:
    options = ["--scenario=poisoned", "--variant=healed", "--data=tests.recipes.tiny.WithoutValidation", QUIET]
    options += ["--poison.first_step=0", "--poison.one_in=3", "--trainer.max_steps=8", "--trainer.limit_val_batches=0"]
    assert run(tmp_path, *options, pressed(4)).code == 130
    without_ctrl_c(tmp_path)
    assert run(tmp_path, *options, "--resume").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--goal.metric=f1"], "`goal.metric` is 'f1', but the evaluation gave test/accuracy"),
        (["--data=tests.recipes.tiny.WithoutTest"], "test_dataloader"),
        (["--data=tests.recipes.tiny.Dictionaries"], "pairs of tensors (inputs, targets), got dict"),
        (["--data.path=/nonexistent"], "/nonexistent"),
        (["--data.batch_size=5000"], "`batch_size` is 5000, but a process has only 1077 training samples"),
        (["--trainer.enable_checkpointing=false"], "enable_checkpointing"),
        (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "take ddp"),
        (["--trainer.limit_test_batches=0"], "evaluation gave nothing"),
    ],
)
def test_what_cannot_work_is_told_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--scenario=clean", *options)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("clean*"))


def test_data_path_takes_idx_files(tmp_path: Path) -> None:
    import numpy as np

    for name, count in (("train", 90), ("t10k", 12)):
        labels = np.arange(count) % 3
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", np.ones((count, 6, 4)) * labels[:, None, None] * 100)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels)
    options = ["--scenario=clean", "--variant=plain", f"--data.path={tmp_path}", "--data.batch_size=8"]
    outcome = run(tmp_path / "runs", *options, "--trainer.max_steps=60", QUIET)
    assert outcome.records()[0]["value"] == 1.0  # brightness is the class


# ---- interruption and resume


class CtrlC(Callback):
    """Presses Ctrl-C in the middle of a step, in one of the trainings of a test."""

    trainings = 0

    def __init__(self, step: int, times: int = 1, training: int = 1) -> None:
        self.step = step
        self.times = times
        self.training = training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        CtrlC.trainings += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step and CtrlC.trainings == self.training:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def without_ctrl_c(output: Path) -> None:
    """Let a resume believe that the same command goes on: its settings do not name the one who pressed the keys."""
    for path in output.glob("*/seed-*/config.yaml"):
        text = path.read_text()
        start = text.index("faults:\n")
        end = text.index("plain:\n")
        path.write_text(text[:start] + "faults: []\n" + text[end:])


def pressed(step: int, times: int = 1, training: int = 1) -> str:
    arguments = f"{{step: {step}, times: {times}, training: {training}}}"
    return f"--faults=[{{class_path: tests.recipes.runner.test_recipe.CtrlC, init_args: {arguments}}}]"


@pytest.mark.parametrize(
    ("step", "option"),
    [
        (0, ""),
        (9, ""),
        (15, ""),  # the last batch of an epoch
        (16, ""),
        (19, ""),  # the last step of all
        (9, "--data.num_workers=1"),
        (9, "--trainer.min_steps=18"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(both: Outcome, tmp_path: Path, step: int, option: str) -> None:
    options = ["--scenario=poisoned", "--variant=healed", QUIET, *filter(None, [option])]
    begun_at = time.perf_counter()
    stopped = run(tmp_path, *options, pressed(step))
    assert stopped.code == 130
    assert "--resume" in stopped.screen
    assert stopped.records() == []
    history = tmp_path / "poisoned-healed" / "seed-0" / "interrupted.json"
    assert f"[{step}, " in history.read_text()
    assert f"[{step + 1}, " not in history.read_text()
    checkpoint = torch.load(history.with_suffix(".ckpt"), weights_only=True)
    seconds_before = checkpoint["callbacks"][InterruptCheckpoint.__name__]["seconds"]
    assert seconds_before > 0
    without_ctrl_c(tmp_path)
    resumed = run(tmp_path, *options, "--resume")
    assert resumed.code == 0
    folder = tmp_path / "poisoned-healed" / "seed-0"
    assert not (folder / "interrupted.ckpt").exists()
    whole, parts = saved(both, "poisoned-healed"), saved(resumed, "poisoned-healed")
    assert parts.value == whole.value
    assert parts.skipped_at == whole.skipped_at
    assert parts.seconds < time.perf_counter() - begun_at
    assert (parts.seconds > seconds_before) == (step + 1 < STEPS)
    for name in ("train/loss", "grad_norm/total", "val/accuracy"):
        assert list(map(repr, parts.history[name])) == list(map(repr, whole.history[name])), name


def test_finished_runs_are_kept_and_the_others_made(both: Outcome, tmp_path: Path) -> None:
    options = ["--scenario=clean", "--seeds=2", QUIET]
    first = run(tmp_path, *options, "--variant=plain")
    kept = (tmp_path / "clean-plain" / "seed-0" / "run.json").stat().st_mtime_ns
    second = run(tmp_path, *options, "--resume")
    assert second.code == first.code == 0
    assert [(record["variant"], record["seed"]) for record in second.records()] == [
        ("plain", 0),
        ("healed", 0),
        ("plain", 1),
        ("healed", 1),
    ]
    assert (tmp_path / "clean-plain" / "seed-0" / "run.json").stat().st_mtime_ns == kept
    expected = [record for record in both.records() if record["scenario"] == "clean"]
    assert [record["value"] for record in second.records()] == [record["value"] for record in expected]


def test_results_of_finished_runs_outlive_an_interruption(both: Outcome, tmp_path: Path) -> None:
    stopped = run(tmp_path, "--scenario=clean", "--seeds=2", QUIET, pressed(3, training=3))
    assert stopped.code == 130
    finished = [record for record in both.records() if record["scenario"] == "clean"][:2]
    assert [record["value"] for record in stopped.records()] == [record["value"] for record in finished]
    assert "healed" in stopped.screen
    assert (tmp_path / "curves.png").exists()


def test_resume_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--scenario=clean", "--variant=plain", QUIET)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--scenario=clean", "--variant=plain", QUIET, "--optimizer.lr=0.1", "--resume")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`resume` goes on with the same settings" in line


def test_an_epoch_cut_short_resumes_at_the_beginning_of_the_next(tmp_path: Path) -> None:
    options = ["--scenario=clean", "--variant=plain", QUIET, "--trainer.limit_train_batches=5"]
    whole = run(tmp_path / "whole", *options)
    run(tmp_path / "parts", *options, pressed(4))
    without_ctrl_c(tmp_path / "parts")
    parts = run(tmp_path / "parts", *options, "--resume")
    assert saved(parts, "clean-plain").history["train/loss"] == saved(whole, "clean-plain").history["train/loss"]


def test_an_ablation_goes_on_where_it_was_interrupted(both: Outcome, tmp_path: Path) -> None:
    options = ["--scenario=clean", "--variant=healed", "--ablate", QUIET]
    stopped = run(tmp_path, *options, pressed(3, training=3))
    assert stopped.code == 130
    assert [record["without"] for record in stopped.records("ablation.json")] == ["initialization"]
    without_ctrl_c(tmp_path)
    resumed = run(tmp_path, *options, "--resume")
    expected = [r["value"] for r in both.records("ablation.json") if (r["scenario"], r["seed"]) == ("clean", 0)]
    assert [record["value"] for record in resumed.records("ablation.json")] == expected


def test_settings_that_are_null_stay_null(tmp_path: Path) -> None:
    options = ["--scenario=clean", "--variant=healed", QUIET, "--trainer.max_steps=5"]
    first = run(tmp_path / "first", *options, "--healed.clipping=null", "--healed.initialization=null")
    settings = tmp_path / "first" / "clean-healed" / "seed-0" / "config.yaml"
    again = run(tmp_path / "again", f"--config={settings}", "--variant=healed")
    assert saved(again, "clean-healed").history == saved(first, "clean-healed").history


def test_what_others_put_into_the_folder_stays(tmp_path: Path) -> None:
    thesis = tmp_path / "clean-plain" / "seed-0" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    for path in (thesis, thesis.with_name("config.yaml"), tmp_path / "ablation.json"):
        path.write_text("mine")
    run(tmp_path, "--scenario=clean", "--variant=plain", QUIET, "--trainer.max_steps=2")
    assert thesis.read_text() == (tmp_path / "ablation.json").read_text() == "mine"


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "clean-plain" / "seed-0"
    folder.mkdir(parents=True)
    half, in_work = folder / ".unfinished-0-run.json", folder / ".unfinished-1-run.json"
    for path in (half, in_work):
        path.write_text("{")
    os.utime(half, (0, 0))
    run(tmp_path, "--scenario=clean", "--variant=plain", QUIET, "--trainer.max_steps=2")
    assert not half.exists()
    assert in_work.exists()  # perhaps another process writes it at this moment


def test_settings_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_text

    def write_text(path: Path, text: str, **options: Any) -> int:
        if not path.name.endswith("config.yaml"):
            return written(path, text, **options)
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path, "--scenario=clean", "--variant=plain", QUIET)
    assert not list((tmp_path / "clean-plain" / "seed-0").iterdir())


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    stopped = run(tmp_path, "--scenario=clean", "--variant=plain", QUIET, pressed(3, times=2))
    assert stopped.code == 130
    assert not (tmp_path / "clean-plain" / "seed-0" / "interrupted.ckpt").exists()
    # What left no checkpoint begins anew.
    without_ctrl_c(tmp_path)
    resumed = run(tmp_path, "--scenario=clean", "--variant=plain", QUIET, "--resume")
    assert resumed.code == 0
    assert len(list((tmp_path / "clean-plain" / "seed-0").glob("events*"))) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- several processes


def in_two_processes(output: Path, strategy: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tiny recipe as a command of its own, for 12 steps."""
    program = output.with_name("tiny.py")
    program.write_text(
        "import sys, recipes.runner._main as main; from tests.recipes.tiny import CONFIGS; main.CONFIGS = CONFIGS;"
        "sys.exit(main.run_recipe('tiny', sys.argv[1:]))"
    )
    root = Path(__file__).parents[3]
    config = f"--config={root / 'configs' / 'strategy' / f'{strategy}.yaml'}"
    return subprocess.run(
        [sys.executable, str(program), f"--output={output}", config, "--trainer.max_steps=12", QUIET, *options],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def leave_a_run(output: Path) -> None:
    """What an earlier command left counts for no process, whichever comes first."""
    stale = output / "poisoned-healed" / "seed-0"
    stale.mkdir(parents=True)
    (stale / "config.yaml").write_text("seed: 0")
    finished_run("healed", 0.123, scenario="poisoned").save(stale / "run.json")


def check_both_variants(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    assert finished.returncode == 0, finished.stderr[-3000:]
    outcome = Outcome(0, finished.stdout, output)
    assert [record["variant"] for record in outcome.records()] == ["plain", "healed"]
    assert finished.stdout.count("Curves ") == 1  # one process speaks
    healed = saved(outcome, "poisoned-healed")
    hits = [step for step in range(12) if Poison(one_in=8, first_step=4).hits(step, seed=0)]
    assert healed.skipped_at == hits != []
    assert [step for step, _ in healed.history["train/loss"]] == list(range(12))
    assert math.isfinite(healed.history["train/loss"][-1][1])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    leave_a_run(tmp_path / "runs")
    check_both_variants(in_two_processes(tmp_path / "runs", "ddp", "--scenario=poisoned"), tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_that_share_a_model_go_on_after_an_interruption(tmp_path: Path) -> None:
    leave_a_run(tmp_path / "runs")
    in_the_healed_run = pressed(5, training=2)
    stopped = in_two_processes(tmp_path / "runs", "fsdp2", "--scenario=poisoned", in_the_healed_run)
    assert stopped.returncode == 130, stopped.stderr[-3000:]
    without_ctrl_c(tmp_path / "runs")
    resumed = in_two_processes(tmp_path / "runs", "fsdp2", "--scenario=poisoned", "--resume")
    check_both_variants(resumed, tmp_path / "runs")
    assert not list((tmp_path / "runs" / "poisoned-healed" / "seed-0").glob("interrupted*"))
