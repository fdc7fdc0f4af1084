"""Two processes on the CPU, by DDP and by FSDP2: one verdict, one norm, the same weights, and no process left waiting.

One pair of processes runs all scenarios of distributed_worker.py; the tests look at what it wrote down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests import distributed_worker as worker
from tests.models import assert_same_bits
from tests.process_pair import MARKS, PROCESSES, logs, outcomes, run_processes

KINDS = ("ddp", "fsdp2")

Outcome = Callable[[str, str], list[Any]]

pytestmark = MARKS


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def exit_codes(directory: Path) -> list[int]:
    """Let the processes run; how they ended. Their output lies in the directory."""
    return run_processes(worker.__name__, directory)


@pytest.fixture(scope="session")
def outcome(exit_codes: list[int], directory: Path) -> Outcome:
    """The results of a scenario, one for each process."""
    return partial(outcomes, directory)


@pytest.fixture(scope="session")
def alone(directory: Path) -> dict[str, Any]:
    """The suite in one process that gets the batches of all."""
    return worker.whole_suite("alone", directory)


def shared(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a training state that is the same on all processes: not the buffers, which see local batches."""
    weights = {
        name: value
        for name, value in state["model"].items()
        if not any(buffer in name for buffer in ("mean_input", "running_", "num_batches"))
    }
    return {"weights": weights, "optimizers": state["optimizers"]}


def test_both_processes_end_well(exit_codes: list[int], directory: Path) -> None:
    assert exit_codes == [0] * PROCESSES, logs(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_the_suite_trains_as_one_process_with_all_batches(kind: str, outcome: Outcome, alone: dict[str, Any]) -> None:
    first, second = outcome("whole_suite", kind)
    assert_same_bits(shared(first["state"]), shared(second["state"]))
    start, end = first["metrics"][0], first["metrics"][worker.GOOD_BATCHES - 1]
    assert start["weight_norm/net.first"] != end["weight_norm/net.first"]
    torch.testing.assert_close(shared(first["state"]), shared(alone["state"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_those_of_one_process_with_all_batches(
    kind: str, outcome: Outcome, alone: dict[str, Any]
) -> None:
    first, second = outcome("whole_suite", kind)
    assert_same_bits(first["metrics"], second["metrics"])
    torch.testing.assert_close(first["metrics"], alone["metrics"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_histograms_hold_whole_tensors(kind: str, outcome: Outcome, alone: dict[str, Any], directory: Path) -> None:
    outcome("whole_suite", kind)
    ours, reference = (histograms(directory / f"tensorboard {name}") for name in (kind, "alone"))
    assert ours.keys() == reference.keys()
    assert ours["gradients/net.first.weight"]["num"] == 32
    assert ours["weights/net.gain"]["num"] == 1
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def histograms(directory: Path) -> dict[str, dict[str, float]]:
    events = EventAccumulator(str(directory), size_guidance={"histograms": 0}).Reload()
    statistics = ("num", "min", "max", "sum", "sum_squares")
    return {
        tag: {name: getattr(event.histogram_value, name) for name in statistics}
        for tag in events.Tags()["histograms"]
        for event in events.Histograms(tag)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_observers_change_no_bit(kind: str, outcome: Outcome) -> None:
    for result in outcome("observers", kind):
        assert_same_bits(result["with"]["state"], result["without"]["state"])


FAULTY_RUNS = {
    "ddp": [*worker.OPTIMIZERS, "bf16-mixed", "accumulation", "TwoOptimizers", "SparseNet", "TiedNet"],
    "fsdp2": [name for name in worker.OPTIMIZERS if name not in worker.WITHOUT_SHARDED_KERNEL]
    + ["bf16-mixed", "accumulation"],
}


@pytest.mark.parametrize(("kind", "run"), [(kind, run) for kind, runs in FAULTY_RUNS.items() for run in runs])
def test_a_fault_on_one_process_is_skipped_by_all_without_a_trace(kind: str, run: str, outcome: Outcome) -> None:
    results = [result[run] for result in outcome("faults", kind)]
    skipped = {"accumulation": 1, "TwoOptimizers": 2 * len(worker.FAULTS)}.get(run, len(worker.FAULTS))
    for result in results:
        assert result["faulty"]["skipped"] == skipped
        assert_same_bits(result["faulty"]["state"], result["clean"]["state"])
    assert_same_bits(*(shared(result["faulty"]["state"]) for result in results))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_only_a_fused_optimizer_without_shards_leaves_the_verdict_on_the_device(
    optimizer: str, kind: str, outcome: Outcome
) -> None:
    skips = [position in worker.FAULTS for position in range(worker.GOOD_BATCHES + len(worker.FAULTS))]
    on_device = optimizer == "fused adamw" and kind == "ddp"
    # Before its first good step a fused optimizer has no state yet, so the host must know.
    expected = [True, False] + [None] * (len(skips) - 2) if on_device else skips
    for result in outcome("faults", kind):
        assert result[optimizer]["verdicts"] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "fused adamw"])
def test_divergence_stops_every_process(optimizer: str, kind: str, outcome: Outcome) -> None:
    reasons = [result[optimizer] for result in outcome("divergence", kind)]
    for reason in reasons:
        assert "2 steps in a row were skipped" in reason
        assert "The last one was step 3 (epoch 0, batch 3" in reason
    assert "found by another process" in reasons[0]
    assert "found by another process" not in reasons[1]
    assert "loss nan" in reasons[1]


RESUMED_RUNS = [(kind, *saver) for kind, savers in worker.SAVERS.items() for saver in savers]


@pytest.mark.parametrize(("kind", "form", "place"), RESUMED_RUNS)
def test_resumed_equals_uninterrupted(kind: str, form: str, place: str, outcome: Outcome) -> None:
    for result in outcome("resume", kind):
        uninterrupted, resumed = (result[form, place][run] for run in ("uninterrupted", "resumed"))
        # A checkpoint holds the buffers of one process; under DDP that is the one all others follow.
        part = shared if kind == "fsdp2" else lambda state: state
        assert_same_bits(part(resumed["state"]), part(uninterrupted["state"]))
        assert resumed["skipped"] == uninterrupted["skipped"] == len(worker.FAULTS)
        later = {x: row for x, row in uninterrupted["metrics"].items() if x > worker.SAVED_AFTER}
        assert_same_bits(resumed["metrics"], later)


@pytest.mark.parametrize(("kind", "form", "place"), RESUMED_RUNS)
def test_checkpoints_hold_the_base_rate(kind: str, form: str, place: str, outcome: Outcome, tmp_path: Path) -> None:
    result = outcome("resume", kind)[0][form, place]
    path = result["checkpoint"]
    if form == "sharded":
        dcp_to_torch_save(path, tmp_path / "whole.pt")
        optimizer = torch.load(tmp_path / "whole.pt", weights_only=False)["optimizer_0"]
    else:
        (optimizer,) = torch.load(path, weights_only=False)["optimizer_states"]
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.01]
    assert result["uninterrupted"]["metrics"][worker.SAVED_AFTER]["lr/AdamW"] < 0.0099


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["saved first", "saved last", "read first"])
def test_a_checkpoint_that_makes_optimizer_state_does_not_disturb(kind: str, when: str, outcome: Outcome) -> None:
    for result in outcome("checkpoint_before_any_state", kind):
        assert result[when]["skipped"] == 1
        assert not [warning for warning in result[when]["warnings"] if "stability callbacks" in warning]
        assert_same_bits(result[when]["metrics"], result["never"]["metrics"])
        assert_same_bits(result[when]["state"], result["never"]["state"])


def test_tensor_parallel_training_is_that_of_one_process(outcome: Outcome, tmp_path: Path) -> None:
    alone = worker.parts_of_layers("alone", tmp_path)["suite"]
    for result in outcome("parts_of_layers", "tensor parallel"):
        torch.testing.assert_close(result["suite"]["metrics"], alone["metrics"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result["suite"]["state"], alone["state"], rtol=1e-4, atol=1e-6)
        assert_same_bits(result["observers"]["state"], result["nothing"]["state"])
