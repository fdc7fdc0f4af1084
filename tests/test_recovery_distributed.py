"""Two processes on the CPU, by DDP and by FSDP2: faults in one of them, and the same recovery in both.

One pair of processes runs all scenarios of recovery_worker.py; the tests look at what it wrote down.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from stability_callbacks.diagnosis import Bundle, Incident, bundles, read_bundle, read_incidents
from tests import recovery_worker as worker
from tests.models import assert_same_bits, make_batches
from tests.process_pair import MARKS, PROCESSES, logs, outcomes, run_processes

KINDS = ("ddp", "fsdp2")
STORED = [(kind, storage) for kind, storages in worker.STORAGES.items() for storage in storages]
ON_DISK = [(kind, storage) for kind, storages in worker.ON_DISK.items() for storage in storages]

Outcome = Callable[..., list[Any]]

pytestmark = MARKS


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="session")
def exit_codes(directory: Path) -> list[int]:
    """Let the processes run; how they ended. Their output lies in the directory."""
    return run_processes(worker.__name__, directory)


@pytest.fixture(scope="session")
def outcome(exit_codes: list[int], directory: Path) -> Outcome:
    """The results of a scenario, one for each process."""

    def load(scenario: str, kind: str = "ddp") -> list[Any]:
        return outcomes(directory, scenario, kind)

    return load


def weights(state: dict[str, Any]) -> dict[str, Any]:
    """What is the same in all processes: not the buffers, which see local batches."""
    buffers = ("mean_input", "running_", "num_batches")
    model = {name: value for name, value in state["model"].items() if not any(each in name for each in buffers)}
    return {"model": model, "optimizers": state["optimizers"]}


def recorded(directory: Path) -> list[Incident]:
    return read_incidents(directory / "incidents.jsonl")


def bundle_of(incident: Incident, directory: Path) -> Bundle:
    assert incident.bundle is not None
    return read_bundle(directory / incident.bundle)


def test_both_processes_end_well(exit_codes: list[int], directory: Path) -> None:
    assert exit_codes == [0] * PROCESSES, logs(directory)


# ---- going back


@pytest.mark.parametrize(("kind", "storage"), STORED)
def test_a_bit_flip_in_one_process_leaves_no_trace(kind: str, storage: str, outcome: Outcome) -> None:
    results = outcome("bit_flips", kind)
    for result in results:
        healed = result["healed", storage]
        assert healed["restored"] == [0, 8]
        assert_same_bits(healed["state"], result["clean"]["state"])
    assert_same_bits(*(weights(result["healed", storage]["state"]) for result in results))


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_know_what_was_not_finite(kind: str, outcome: Outcome) -> None:
    # Of sharded weights every process knows; of others only the one that has them.
    rank, where = (1, " on rank 1") if kind == "ddp" else (0, "")
    for result in outcome("bit_flips", kind):
        assert result["healed", "memory"]["told"] == [(rank, f"not finite: net.first.weight{where}")] * 2


@pytest.mark.parametrize(("kind", "storage"), STORED)
def test_a_rollback_that_never_fires_changes_no_bit(kind: str, storage: str, outcome: Outcome) -> None:
    # To save an optimizer without state, torch.distributed.checkpoint makes it one.
    for result in outcome("bit_flips", kind):
        assert_same_bits(result["quiet", storage]["state"], result["clean"]["state"])
        assert result["quiet", storage]["counts"] == [{}]


@pytest.mark.parametrize("storage", worker.STORAGES["fsdp2"])
def test_a_validation_does_not_disturb_snapshots_of_shards(storage: str, outcome: Outcome) -> None:
    results = outcome("after_validation", "fsdp2")
    for result in results:
        assert result[storage]["restored"] == [4]
        assert_same_bits(result[storage]["state"], result["clean"]["state"])
        assert result[storage]["files"] == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize("storage", worker.ON_DISK["fsdp2"])
def test_rates_in_sharded_checkpoints_do_not_come_back(storage: str, outcome: Outcome) -> None:
    for result in outcome("clock", "fsdp2"):
        assert result[storage]["restored"] == [4]
        assert result[storage]["rates"] == pytest.approx([0.01 * worker.DECAY**step for step in range(1, 11)])


@pytest.mark.parametrize("storage", worker.ON_DISK["fsdp2"])
def test_an_optimizer_without_state_is_no_obstacle(storage: str, outcome: Outcome) -> None:
    for result in outcome("without_optimizer_state", "fsdp2"):
        assert result[storage]["restored"] == [4]
        assert_same_bits(result[storage]["state"], result["clean"]["state"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_skips_in_a_row_take_both_back(kind: str, accumulate: int, outcome: Outcome) -> None:
    for result in outcome("consecutive_skips", kind):
        healed, clean = result[accumulate]["healed"], result[accumulate]["clean"]
        assert (healed["skipped"], healed["restored"]) == (2, [4])
        assert_same_bits(healed["state"], clean["state"])
        assert healed["counts"] == [{"nonfinite": 2, "rollback": 1}]
        incidents = recorded(result[accumulate]["record"])
        assert [(each.kind, each.rank) for each in incidents] == [("nonfinite", 1)] * 2 + [("rollback", 0)]


def test_a_bundle_holds_the_whole_window_of_the_process_with_the_fault(outcome: Outcome) -> None:
    result = outcome("consecutive_skips", "ddp")[0][2]
    incident = recorded(result["record"])[0]
    assert (incident.rank, incident.batch_idx) == (1, 13)
    batches = bundle_of(incident, result["record"]).batches
    assert_same_bits([x for x, *_ in batches], [x for x, _ in make_batches(2, seed=1)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_rises_in_one_process_takes_both_back(kind: str, outcome: Outcome) -> None:
    results = outcome("sustained_rise", kind)
    for result in results:
        assert (result["skipped"], result["restored"]) == (0, [60])
        assert result["told"] == [(0, "the loss stayed far above its recent values for 2 steps")]
    assert_same_bits(*(weights(result["state"]) for result in results))


# ---- spikes


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_differ_give_the_same_verdicts_and_the_same_memory(kind: str, outcome: Outcome) -> None:
    results = outcome("spikes", kind)
    for run in ("uninterrupted", "resumed"):
        first, second = (result[run] for result in results)
        assert first["skipped"] == second["skipped"] == 2
        assert_same_bits(first["learned"], second["learned"])
        assert_same_bits(weights(first["state"]), weights(second["state"]))


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_the_first_process_equals_uninterrupted(kind: str, outcome: Outcome) -> None:
    for result in outcome("spikes", kind):
        uninterrupted, resumed = result["uninterrupted"], result["resumed"]
        assert_same_bits(resumed["learned"], uninterrupted["learned"])
        assert_same_bits(weights(resumed["state"]), weights(uninterrupted["state"]))
        assert resumed["counts"] == uninterrupted["counts"] == [{"spike": 2}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spike_is_told_by_the_process_with_the_highest_loss(kind: str, outcome: Outcome) -> None:
    directory = outcome("spikes", kind)[0]["uninterrupted"]["record"]
    incidents = recorded(directory)
    assert [(each.step, each.rank, each.kind) for each in incidents] == [
        (7, 1, "spike"),
        (10, 1, "spike"),
        (10, 1, "spike"),
    ]
    assert incidents[0].evidence["own_loss"] > 1.9 * incidents[0].evidence["loss"]
    (batch,) = bundle_of(incidents[-1], directory).batches
    assert_same_bits(batch[0], make_batches(11, seed=1)[10][0])


# ---- disks and memory


@pytest.mark.parametrize(("kind", "storage"), ON_DISK)
def test_a_snapshot_that_one_process_cannot_write_is_done_without(kind: str, storage: str, outcome: Outcome) -> None:
    results = outcome("snapshots_that_fail", kind)
    for result in results:
        assert result["unwritten", storage]["restored"] == [0]
        assert result["unwritten", storage]["files"] == ["snapshot-step=0.ckpt"]
    assert_same_bits(*(weights(result["unwritten", storage]["state"]) for result in results))


@pytest.mark.parametrize(("kind", "storage"), ON_DISK)
def test_a_snapshot_that_is_damaged_is_done_without(kind: str, storage: str, outcome: Outcome) -> None:
    results = outcome("snapshots_that_fail", kind)
    for result in results:
        assert result["damaged", storage]["restored"] == [4]
    assert_same_bits(*(weights(result["damaged", storage]["state"]) for result in results))


@pytest.mark.parametrize("kind", KINDS)
def test_giving_up_writes_the_last_good_state_once(kind: str, outcome: Outcome, tmp_path: Path) -> None:
    errors = []
    for result in outcome("giving_up", kind):
        written = result["written"]
        assert (written["rollbacks"], written["written"]) == (1, ["last-good-step=0.ckpt"])
        assert "last-good-step=0.ckpt" in written["files"]
        errors.append(written["error"])
    assert errors[0] == errors[1]
    path = written["place"] / "last-good-step=0.ckpt"
    assert str(path) in errors[0]
    if kind == "fsdp2":
        dcp_to_torch_save(path, tmp_path / "whole.pt")
        path = tmp_path / "whole.pt"
    state = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_giving_up_with_a_full_disk_leaves_nobody_waiting(kind: str, outcome: Outcome) -> None:
    for result in outcome("giving_up", kind):
        assert "last-good-step=0.ckpt" not in result["unwritten"]["files"]
        assert "step 0, could not be written" in result["unwritten"]["error"]
    assert "No space left" in outcome("giving_up", kind)[0]["unwritten"]["error"]


def test_the_smallest_budget_counts_for_all(outcome: Outcome) -> None:
    first, second = outcome("memory_budget")
    assert first == second
    kind, keep = first[10**5]
    assert kind == "SnapshotRing"
    assert 1 < keep < 1000
    assert first[100] == ("CheckpointRing", None)


# ---- the gate


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_one_process_keeps_both_from_writing(kind: str, outcome: Outcome) -> None:
    for result in outcome("checkpoint_gate", kind):
        later, never = result["later"], result["from the start"]
        assert later["best"] == ("step=4.ckpt", "last.ckpt")
        assert later["files"] == ["last.ckpt", "record", "step=4.ckpt"]
        assert later["counts"] == [{"nonfinite": 4, "checkpoint_refused": 4}]
        # Neither at the end of training, where ModelCheckpoint makes up for a missing last checkpoint.
        assert (never["best"], never["files"]) == (("", ""), ["record"])
    last = torch.load(later["place"] / "last.ckpt", weights_only=False)
    assert last["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())
    refused = [each for each in recorded(later["place"] / "record") if each.kind == "checkpoint_refused"]
    assert [each.evidence["nonfinite"] for each in refused] == ["net.first.weight"] * 4
    assert {each.rank for each in refused} == {1 if kind == "ddp" else 0}


@pytest.mark.parametrize("kind", KINDS)
def test_nor_is_anything_written_when_an_exception_ends_training(kind: str, outcome: Outcome) -> None:
    for result in outcome("checkpoint_gate", kind):
        assert result["failing"]["error"] == "the user's code fails"
        assert result["failing"]["files"] == ["record"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_gone_afterwards(kind: str, outcome: Outcome) -> None:
    for result in outcome("checkpoint_gate", kind):
        assert [each["left"] for each in result.values()] == [[], [], []]


# ---- the record

CAUSES = {2: "log", 5: "fill_", 6: "add", 7: "mul"}


@pytest.mark.parametrize("name", ["known", "on the device"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_one_line_of_the_process_where_it_began(kind: str, name: str, outcome: Outcome) -> None:
    first, second = (result[name] for result in outcome("record", kind))
    assert first["counts"] == second["counts"] == [{"nonfinite": 4, "input": 1}]
    assert_same_bits(first["metrics"], second["metrics"])
    incidents = recorded(first["record"])
    assert [each.step for each in incidents] == [2, 3, 5, 6, 7]
    assert {each.rank for each in incidents} == {1}
    own = make_batches(12, seed=1)
    for incident in incidents:
        bundle = bundle_of(incident, first["record"])
        (batch,) = bundle.batches
        assert_same_bits(batch[0], own[incident.step][0] * (1e4 if incident.step == 3 else 1))
        assert (bundle.weights is None) == (kind == "fsdp2")
        assert bundle.meta["without_weights"] == ("the model is sharded" if kind == "fsdp2" else None)
        if incident.kind == "input":
            continue
        if kind == "ddp":
            assert incident.operation == CAUSES[incident.step]
        else:
            assert "the model is sharded" in incident.evidence["cause"]
    assert len(bundles(first["record"] / "bundles")) == len(incidents)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_in_one_process_changes_no_bit(kind: str, outcome: Outcome) -> None:
    for result in outcome("record", kind):
        assert_same_bits(result["known"]["state"], result["nobody records"]["state"])


@pytest.mark.parametrize("name", ["known", "on the device"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_process_keeps_batches_of_faults_that_others_told(kind: str, name: str, outcome: Outcome) -> None:
    for result in outcome("record", kind):
        assert result[name]["kept"][-1] == 0


def test_a_step_in_which_processes_meet_is_not_run_again_alone(outcome: Outcome) -> None:
    first, second = outcome("step_that_needs_all")
    assert first["counts"] == second["counts"] == [{"nonfinite": 2}]
    incidents = recorded(first["record"])
    assert [(each.step, each.rank) for each in incidents] == [(3, 1), (5, 1)]
    for incident in incidents:
        assert "this step needs all processes (allreduce_)" in incident.evidence["cause"]
    assert "log made 32 -inf" in incidents[1].evidence["cause"]


def test_a_recorder_that_fails_in_one_process_ends_nothing(outcome: Outcome) -> None:
    results = outcome("recorder_that_fails")
    for run, rank in (("bundle", 1), ("line", 0)):
        assert [result[run]["counts"] for result in results] == [[{"nonfinite": 2}]] * 2
        warned = [[text for text in result[run]["warnings"] if "could not write" in text] for result in results]
        assert [len(texts) for texts in warned] == [int(rank == 0), int(rank == 1)]
    incidents = recorded(results[0]["record"])
    assert [(each.step, each.rank, each.bundle) for each in incidents] == [(3, 1, None), (5, 1, None)]
    assert "this batch is exhausted" in incidents[0].evidence["cause"]


def test_after_an_exception_no_process_waits_for_another(outcome: Outcome) -> None:
    for result in outcome("failure_of_the_user"):
        assert result["error"] == "the user's code fails"
        assert result["meetings"] == 0
    (incident,) = recorded(result["record"])
    assert (incident.step, incident.kind) == (3, "nonfinite")
