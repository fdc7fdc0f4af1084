"""What `python -m recipes.lstm` shows; that its options, files and screen work is the framework's to test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.data._poison import Poison
from recipes.lstm import main

pytestmark = pytest.mark.filterwarnings("ignore:The warm-up of 30 steps is longer than training")

SMALL = ["--trainer.enable_progress_bar=false", "--model.hidden_size=16", "--split=val"]
SINE = ["--scenario=sine", "--trainer.max_steps=80", "--trainer.enable_progress_bar=false", "--split=val"]


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture takes longer than these runs; one test draws it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("recipes.lstm.gradient_through_time", lambda output: output / "none.png")


def history(output: Path, name: str, metric: str = "train/loss") -> list[float]:
    run = json.loads((output / name / "seed-0" / "run.json").read_text())
    return [value for _, value in run["history"][metric]]


def records(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "results.json").read_text())
    return found


def test_all_scenarios_and_the_picture(tmp_path: Path) -> None:
    main([*SMALL, f"--output={tmp_path}", "--trainer.max_steps=2", "--poison.one_in=1", "--poison.first_step=0"])
    assert [(record["scenario"], record["variant"], record["metric"]) for record in records(tmp_path)] == [
        (scenario, variant, metric)
        for scenario, metric in [
            ("exploding", "accuracy"),
            ("poisoned", "accuracy"),
            ("relu_rnn", "accuracy"),
            ("sine", "r2"),
        ]
        for variant in ("plain", "healed")
    ]
    assert (tmp_path / "gradient_through_time.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_initialization_both_variants_start_alike(tmp_path: Path) -> None:
    options = ["--scenario=exploding", "--trainer.max_steps=3", "--healed.initialization=null"]
    main([*SMALL, f"--output={tmp_path}", *options])
    plain, healed = (history(tmp_path, f"exploding-{variant}") for variant in ("plain", "healed"))
    assert plain[0] == healed[0]
    assert plain[2] != healed[2]


def test_a_nan_kills_the_plain_network_and_is_skipped_by_the_guard(tmp_path: Path) -> None:
    hits = [step for step in range(12) if Poison(one_in=4, first_step=4).hits(step, seed=0)]
    options = ["--scenario=poisoned", "--trainer.max_steps=12", "--poison.one_in=4", "--poison.first_step=4"]
    main([*SMALL, f"--output={tmp_path}", *options])
    dead = [not math.isfinite(loss) for loss in history(tmp_path, "poisoned-plain")]
    assert dead == [step >= hits[0] for step in range(12)]
    sick = [step for step, loss in enumerate(history(tmp_path, "poisoned-healed")) if not math.isfinite(loss)]
    assert sick == hits
    assert history(tmp_path, "poisoned-healed", "stability/skipped_steps")[-1] == len(hits) == 2


def test_careless_relu_weights_are_nan_after_one_step_and_healed_at_the_same_rate(tmp_path: Path) -> None:
    options = ["--trainer.enable_progress_bar=false", "--split=val", "--scenario=relu_rnn", "--trainer.max_steps=6"]
    main([*options, f"--output={tmp_path}"])
    plain = history(tmp_path, "relu_rnn-plain")
    assert math.isfinite(plain[0])
    assert not any(map(math.isfinite, plain[1:]))
    assert max(history(tmp_path, "relu_rnn-healed")) < 3


def test_clipping_alone_keeps_the_sine_network_from_being_thrown_back(tmp_path: Path) -> None:
    main([*SINE, f"--output={tmp_path}"])
    plain, healed = (history(tmp_path, f"sine-{variant}") for variant in ("plain", "healed"))
    assert plain[0] == healed[0]  # the same weights and waves
    assert max(plain) > 5 * plain[0]
    assert max(healed) < 2 * healed[0]


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_other_cells_are_an_option(tmp_path: Path, cell: str) -> None:
    main([*SMALL, f"--output={tmp_path}", "--scenario=exploding", "--trainer.max_steps=3", f"--model.cell={cell}"])
    settings = (tmp_path / "exploding-healed" / "seed-0" / "config.yaml").read_text()
    assert f"cell: {cell}" in settings
    assert all(map(math.isfinite, history(tmp_path, "exploding-healed")))
