"""Faults in two processes on the CPU: on one only or on both, with one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stability_callbacks.faults import Injection
from tests.callbacks import fault_worker as rehearsal
from tests.distributed_worker import GOOD_BATCHES
from tests.models import assert_same_bits
from tests.process_pair import MARKS, PROCESSES, logs, outcomes, run_processes

pytestmark = MARKS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes wrote what came out."""
    directory = tmp_path_factory.mktemp("faults")
    codes = run_processes(rehearsal.__name__, directory)
    assert codes == [0] * PROCESSES, logs(directory)
    return directory


def weights(result: Any) -> dict[str, torch.Tensor]:
    """What all processes must share: not the buffers, which see local batches."""
    buffers = ("mean_input", "running_", "num_batches")
    return {
        name: value for name, value in result["state"]["model"].items() if not any(part in name for part in buffers)
    }


def not_finite(result: Any) -> int:
    return sum(int((~value.isfinite()).sum()) for value in weights(result).values())


def test_a_gradient_is_hit_after_the_processes_have_reduced_it(directory: Path) -> None:
    zero, one = outcomes(directory, "alone", "ddp")
    assert_same_bits(weights(zero["gradient on 1"]), weights(zero["none"]))
    assert not_finite(one["gradient on 1"]) == 1
    assert [not_finite(each["gradient on all"]) for each in (zero, one)] == [1, 1]
    assert_same_bits(weights(zero["gradient on all"]), weights(one["gradient on all"]))
    assert [not_finite(each["accumulated gradient on 1"]) for each in (zero, one)] == [0, 1]


def test_a_learning_rate_surges_on_one_process_only(directory: Path) -> None:
    zero, one = outcomes(directory, "alone", "ddp")
    assert_same_bits(weights(zero["rate on 1"]), weights(zero["none"]))
    assert any((weights(one["rate on 1"])[name] != value).any() for name, value in weights(one["none"]).items())


def test_a_bad_input_on_one_process_reaches_all_through_the_gradients(directory: Path) -> None:
    assert all(not_finite(each["input on 1"]) > 1 for each in outcomes(directory, "alone", "ddp"))


def test_every_process_keeps_the_whole_record(directory: Path) -> None:
    zero, one = outcomes(directory, "alone", "ddp")
    assert {name: each["injected"] for name, each in zero.items()} == {name: one[name]["injected"] for name in one}
    assert zero["rate on 1"]["injected"] == [Injection(GOOD_BATCHES - 1, "learning_rate", 2.0, "SGD", 1)]


@pytest.mark.parametrize("rank", rehearsal.RANKS)
@pytest.mark.parametrize("target", rehearsal.TARGETS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_fault_on_any_process_is_skipped_by_all(kind: str, target: str, rank: int | None, directory: Path) -> None:
    for result in outcomes(directory, "guarded", kind):
        faulty, clean = result[target, rank], result["clean"]
        assert [(each.step, each.target, each.rank) for each in faulty["injected"]] == [
            (rehearsal.FAULTY_STEP, target, rank)
        ]
        assert faulty["skipped"] == 1
        assert_same_bits(weights(faulty), weights(clean))
        assert_same_bits(faulty["state"]["optimizers"], clean["state"]["optimizers"])
