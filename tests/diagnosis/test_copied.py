"""Running a model on a copy of it, where the process can't be copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks import FlightRecorder, Initialization, StepGuard
from stability_callbacks.callbacks import flight_recorder, initialization
from stability_callbacks.diagnosis import Failure, can_run_in_fork, read_incidents, run_on_copy
from tests.models import NormNet, assert_same_bits, fit, make_batches, poison, training_state


class Besides(NormNet):
    """Moves a teacher, draws from an iterator and a generator of its own, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.more = iter([torch.full((), 0.01 * place) for place in range(12)])
        self.generator = torch.Generator().manual_seed(1)
        self.calls = 0

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        noise = torch.rand((), generator=self.generator)
        return super().loss(batch) * (1 + 0.01 * self.calls + next(self.more) + noise)


class HoldsGenerator(NormNet):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.draw()

    @staticmethod
    def draw() -> Iterator[float]:
        yield from (0.1 * place for place in range(100))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + next(self.numbers))


@pytest.fixture
def no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator."""
    for module in (flight_recorder, initialization):
        monkeypatch.setattr(module, "can_run_in_fork", lambda *arguments: False)


def train(make: Any, *callbacks: Any) -> Any:
    torch.manual_seed(0)
    model, batches = make(), make_batches(12)
    batches[4], batches[9] = poison(batches[4]), poison(batches[9])
    return training_state(model, fit(model, batches, callbacks))


@pytest.mark.usefixtures("no_fork")
def test_a_search_on_a_copy_leaves_no_trace_and_finds_the_cause(tmp_path: Any) -> None:
    assert_same_bits(train(Besides, StepGuard(), FlightRecorder(tmp_path)), train(Besides, StepGuard()))
    incidents = read_incidents(tmp_path / "incidents.jsonl")
    assert [incident.evidence["phase"] for incident in incidents] == ["input"] * 2


@pytest.mark.usefixtures("no_fork")
def test_what_can_not_be_copied_is_not_searched(tmp_path: Any) -> None:
    assert_same_bits(train(HoldsGenerator, StepGuard(), FlightRecorder(tmp_path)), train(HoldsGenerator, StepGuard()))
    causes = [str(incident.evidence["cause"]) for incident in read_incidents(tmp_path / "incidents.jsonl")]
    assert all(cause.startswith("not looked for: this model can't be copied (TypeError") for cause in causes)


@pytest.mark.usefixtures("no_fork")
def test_a_check_on_a_copy_leaves_no_trace() -> None:
    checked, plain = (Initialization(verbose=False, check=check) for check in (True, False))
    assert_same_bits(train(Besides, checked, StepGuard()), train(Besides, plain, StepGuard()))
    assert checked.signal_report is not None


def test_work_that_raises_is_a_failure() -> None:
    found = run_on_copy(lambda model, batch: model(batch), nn.Linear(2, 2), torch.zeros(3, 7))
    assert isinstance(found, Failure)
    assert found.started
    assert "RuntimeError" in found.reason


def test_tensors_outside_of_host_memory_rule_a_fork_out() -> None:
    assert can_run_in_fork(nn.Linear(2, 2), {"x": torch.zeros(1)})
    assert not can_run_in_fork(nn.Linear(2, 2, device="meta"))
    assert not can_run_in_fork(nn.Linear(2, 2), [torch.zeros(1, device="meta")])
