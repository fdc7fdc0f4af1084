"""What `python -m recipes.mlp` shows; that its options, files and screen work is the framework's to test."""

from __future__ import annotations

import json
import math
from pathlib import Path

from recipes.mlp import main

SHORT = ["--trainer.enable_progress_bar=false", "--goal.threshold=0.0", "--split=val"]


def losses(output: Path, name: str) -> list[float]:
    run = json.loads((output / name / "seed-0" / "run.json").read_text())
    return [loss for _, loss in run["history"]["train/loss"]]


def test_all_scenarios(tmp_path: Path) -> None:
    assert main([*SHORT, f"--output={tmp_path}", "--trainer.max_steps=2", "--model.width=16", "--poison.one_in=1"]) == 0
    records = json.loads((tmp_path / "results.json").read_text())
    names = ["exploding", "poisoned", "vanishing"]
    assert [(record["scenario"], record["variant"]) for record in records] == [
        (name, variant) for name in names for variant in ("plain", "healed")
    ]


def test_large_weights_are_nan_at_once_and_healed_at_the_same_rate(tmp_path: Path) -> None:
    assert main([*SHORT, f"--output={tmp_path}", "--trainer.max_steps=6", "--scenario=exploding"]) == 0
    assert not math.isfinite(losses(tmp_path, "exploding-plain")[-1])
    assert max(losses(tmp_path, "exploding-healed")) < 10


def test_nan_batches_kill_the_plain_network_and_are_skipped_by_the_guard(tmp_path: Path) -> None:
    poison = ["--poison.one_in=4", "--poison.first_step=0"]
    assert main([*SHORT, f"--output={tmp_path}", "--trainer.max_steps=16", "--scenario=poisoned", *poison]) == 0
    dead = [not math.isfinite(loss) for loss in losses(tmp_path, "poisoned-plain")]
    assert dead[-1]
    assert dead == sorted(dead)
    assert sum(not math.isfinite(loss) for loss in losses(tmp_path, "poisoned-healed")) == 4


def test_default_weights_move_nothing_and_kaimings_do(tmp_path: Path) -> None:
    assert main([*SHORT, f"--output={tmp_path}", "--trainer.max_steps=20", "--scenario=vanishing"]) == 0
    runs = [json.loads((tmp_path / f"vanishing-{name}/seed-0/run.json").read_text()) for name in ("plain", "healed")]
    plain, healed = (run["history"]["grad_norm/layers.1"][0][1] for run in runs)
    assert plain < 1e-6
    assert healed > 1e-2
