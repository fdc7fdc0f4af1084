"""A training process that is killed at any moment, again and again, and goes on each time as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from stability_callbacks.diagnosis import read_incidents
from tests import kill_worker as worker
from tests.models import assert_same_bits

ROOT = Path(__file__).parents[1]
HARD_TIMEOUT = 600.0  # seconds, against hangs alone; it takes about 10 on a free core

# The first test waits for the processes.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.timeout(HARD_TIMEOUT + 60),
]

PARTS = ["state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch"]


class Outcome(NamedTuple):
    """What became of the runs: the lives of the killed one, what was said, and checkpoints.

    They are the last one of the uninterrupted run, and what the killed run had in its place when it had trained to the
    end, and when it was started once more.
    """

    directory: Path
    lives: list[dict[str, Any]]
    log: str
    uninterrupted: dict[str, Any]
    killed: dict[str, Any]
    started_again: dict[str, Any]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All but how many epochs began: Lightning forgets one when it resumes where an epoch ends."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        del count["ready"], count["started"]
    return checkpoint


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    directory = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "-m", worker.__name__, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (directory / "log").open("w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=HARD_TIMEOUT, check=False)
    text = (directory / "log").read_text()
    assert (directory / "lives.json").exists(), text[-4000:]
    lives = json.loads((directory / "lives.json").read_text())
    uninterrupted, started_again = (directory / run / worker.LAST for run in worker.RUNS)
    paths = (uninterrupted, directory / "trained.ckpt", started_again)
    return Outcome(directory, lives, text, *map(read_checkpoint, paths))


def state_of(checkpoint: dict[str, Any], callback: str) -> Any:
    [state] = [state for key, state in checkpoint["callbacks"].items() if key.startswith(callback)]
    return state


def our_callbacks(outcome: Outcome) -> list[str]:
    ours = [key for key in outcome.uninterrupted["callbacks"] if not key.startswith("ModelCheckpoint")]  # has paths
    assert len(ours) == 7
    return ours


def test_it_was_killed_in_every_life_but_the_last(outcome: Outcome) -> None:
    *lives, last = outcome.lives
    assert [life["killed"] for life in lives] == [True] * (worker.KILLS + 1)
    assert sum(life["in_write"] for life in lives) >= worker.KILLS // 2
    assert (last["killed"], last["code"]) == (False, 0), outcome.log[-4000:]


def test_it_went_on_from_many_places(outcome: Outcome) -> None:
    begun_at = [life["begun_at"] for life in outcome.lives]
    assert begun_at == sorted(begun_at)
    assert worker.EPOCH_END in begun_at
    assert len(set(begun_at)) > worker.KILLS // 2
    assert sum(life["steps"] for life in outcome.lives) > worker.STEPS


def test_what_was_half_written_was_named_and_an_older_one_taken(outcome: Outcome) -> None:
    assert "is damaged" in outcome.log
    assert "None of the" not in outcome.log


@pytest.mark.parametrize("part", PARTS)
def test_the_last_checkpoint_is_that_of_a_run_that_was_never_killed(part: str, outcome: Outcome) -> None:
    assert_same_bits(outcome.killed[part], outcome.uninterrupted[part], part)


def test_so_is_what_the_callbacks_keep(outcome: Outcome) -> None:
    for key in our_callbacks(outcome):
        assert_same_bits(
            *(without_places(each["callbacks"][key]) for each in (outcome.killed, outcome.uninterrupted)), key
        )


def without_places(state: dict[str, Any]) -> dict[str, Any]:
    """A callback's state without the names of runs and where snapshots lie: no two runs have these in common."""
    state = {key: value for key, value in state.items() if key != "runs"}
    if "snapshots" in state:
        own = ("path", "run")
        state["snapshots"] = [{key: each[key] for key in each if key not in own} for each in state["snapshots"]]
    return state


def test_a_kill_after_the_last_step_changes_nothing(outcome: Outcome) -> None:
    *_, killed, last = outcome.lives
    assert killed["begun_at"] + killed["steps"] == worker.STEPS
    assert (last["begun_at"], last["steps"]) == (worker.STEPS, 0)
    for part in PARTS:
        assert_same_bits(outcome.started_again[part], outcome.killed[part], part)
    for key in our_callbacks(outcome):
        assert_same_bits(outcome.started_again["callbacks"][key], outcome.killed["callbacks"][key], key)


def test_the_faults_did_happen(outcome: Outcome) -> None:
    injected = state_of(outcome.killed, "FaultInjector")["injected"]
    assert [step for step, *_ in injected] == sorted(step for fault in worker.FAULTS for step in fault.steps)  # type: ignore[union-attr]
    assert state_of(outcome.killed, "Rollback")["rollbacks"] == worker.ROLLBACKS
    assert state_of(outcome.killed, "StepGuard")["skipped_steps"] == worker.SKIPS


def test_the_record_can_be_read_and_lacks_nothing(outcome: Outcome) -> None:
    # Steps that were repeated after a kill are in it each time.
    uninterrupted, killed = (
        read_incidents(outcome.directory / run / "record" / "incidents.jsonl") for run in worker.RUNS
    )
    told = {(incident.step, incident.kind, incident.action) for incident in killed}
    assert told == {(incident.step, incident.kind, incident.action) for incident in uninterrupted}
    assert len(killed) >= len(uninterrupted)
