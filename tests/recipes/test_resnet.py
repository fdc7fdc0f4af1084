"""What `python -m recipes.resnet` shows; that its options, files and screen work is the framework's to test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.data import Poison
from recipes.resnet import main
from recipes.results import Run

SCENARIOS = ["exploding", "poisoned", "scaled", "stuck", "vanishing"]
STEPS = 10
TINY = [
    f"--trainer.max_steps={STEPS}",
    "--trainer.enable_progress_bar=false",
    "--model.channels=4",
    "--goal.threshold=0.0",
    "--plain.monitor.histograms=false",
    "--healed.monitor.histograms=false",
]


def recipe(output: Path, *options: str) -> int:
    return main([*TINY, f"--output={output}", *options])


def run(output: Path, name: str) -> Run:
    return Run.load(output / name / "seed-0" / "run.json")


@pytest.mark.slow
def test_every_scenario_is_trained_plain_and_healed(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    # No --healed.schedule here: it would bring a schedule into scenarios that have none.
    with pytest.warns(UserWarning, match="The warm-up of .* steps is longer than training"):
        assert recipe(tmp_path) == 0
    records: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())
    assert [(each["scenario"], each["variant"]) for each in records] == [
        (scenario, variant) for scenario in SCENARIOS for variant in ("plain", "healed")
    ]
    assert all(each["metric"] == "accuracy" and each["success"] for each in records)


def test_the_exploding_network_is_dead_at_once_and_the_healed_one_is_not(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    with pytest.warns(UserWarning, match="The warm-up of .* steps is longer than training"):
        recipe(tmp_path, "--scenario=exploding", "--model.channels=16", "--trainer.max_steps=4")
    assert run(tmp_path, "exploding-plain").died_at in (1, 2)
    assert run(tmp_path, "exploding-healed").died_at is None


@pytest.mark.parametrize("scenario", ["poisoned", "scaled"])
def test_the_guard_skips_the_bad_batches_and_no_others(tmp_path: Path, scenario: str) -> None:
    pytest.importorskip("mlxtend")
    hits = [step for step in range(STEPS) if Poison(one_in=4, first_step=2).hits(step, seed=0)]
    recipe(tmp_path, f"--scenario={scenario}", "--poison.one_in=4", "--poison.first_step=2")
    assert run(tmp_path, f"{scenario}-healed").skipped_at == hits != []
    assert run(tmp_path, f"{scenario}-plain").died_at == (hits[0] if scenario == "poisoned" else None)


def test_resnet18_by_class_path(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    options = ["--scenario=stuck", "--variant=plain", "--data.side=4", "--data.batch_size=4", "--trainer.max_steps=2"]
    model = ["--model=recipes.resnet.ResNet18", "--model.small_stem=true"]
    small = [option for option in TINY if "channels" not in option]
    assert main([*small, f"--output={tmp_path}", *model, *options]) == 0
    assert len(run(tmp_path, "stuck-plain").history["train/loss"]) == 2
