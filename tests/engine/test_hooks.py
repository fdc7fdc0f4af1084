"""The order of callbacks is declared, and a step calls only those that take part in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stability_callbacks import (
    FaultInjector,
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    LRSchedule,
    Rollback,
    StepGuard,
    WeightPenalty,
)
from stability_callbacks.clipping import NormClip
from stability_callbacks.diagnosis import read_bundle, read_incidents
from stability_callbacks.engine import Participants, Phase, StabilityCallback, StepHooks
from stability_callbacks.faults import Fault
from stability_callbacks.schedules import WarmupConstant
from tests.models import NormNet, assert_same_bits, fit, make_batches, poison, training_state

pytestmark = pytest.mark.filterwarnings("ignore:FaultInjector puts faults")

CLASSES = (
    FaultInjector,
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    LRSchedule,
    Rollback,
    StepGuard,
    WeightPenalty,
)


def callbacks(directory: Path, prefix: str = "") -> list[StabilityCallback]:
    """All callbacks, or subclasses of them whose names begin with a prefix."""
    arguments: dict[type, dict[str, Any]] = {
        FaultInjector: {"faults": Fault("weight", "nan", steps=5)},
        FlightRecorder: {"dirpath": directory},
        GradientClipping: {"rule": NormClip(0.5)},
        GradientMonitor: {},
        LRSchedule: {"schedule": WarmupConstant(warmup=4)},
        Rollback: {"every_n_steps": 2, "patience": 1},
        StepGuard: {},
        WeightPenalty: {"l2": 0.01},
    }
    kinds = [type(f"{prefix}{cls.__name__}", (cls,), {}) if prefix else cls for cls in CLASSES]
    return [kind(**arguments[cls]) for kind, cls in zip(kinds, CLASSES, strict=True)]


def train(directory: Path, prefix: str) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    model, batches = NormNet(), make_batches(10)
    batches[3] = poison(batches[3])
    state = training_state(model, fit(model, batches, callbacks(directory, prefix)))
    told = [
        (each.step, each.kind, each.action, each.module, each.operation, each.evidence.get("cause"))
        for each in read_incidents(directory / "incidents.jsonl")
    ]
    return state, told


def test_names_of_classes_decide_nothing(tmp_path: Path) -> None:
    plain, told = train(tmp_path / "plain", "")
    assert len({kind for _, kind, *_ in told}) > 1
    for prefix in ("A", "Z"):
        state, record = train(tmp_path / prefix, prefix)
        assert_same_bits(state["model"], plain["model"])
        assert record == told


class VerboseFlightRecorder(FlightRecorder):
    """A user's subclass, whose name comes after that of the rollback."""


def test_a_subclass_of_the_recorder_still_writes_down_the_weights_of_the_step(tmp_path: Path) -> None:
    batches = make_batches(8)
    recorder = VerboseFlightRecorder(tmp_path)
    injector = FaultInjector(Fault("weight", "nan", steps=5))
    fit(NormNet(), batches, [Rollback(every_n_steps=2, patience=1), StepGuard(), recorder, injector])
    [incident, rollback] = read_incidents(tmp_path / "incidents.jsonl")
    assert (incident.kind, rollback.kind) == ("nonfinite", "rollback")
    weights = read_bundle(tmp_path / str(incident.bundle)).weights
    assert weights is not None
    assert any(not value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("cls", CLASSES)
def test_every_callback_states_its_phase(cls: type[StabilityCallback]) -> None:
    assert "phase" in vars(cls)


def test_what_acts_stands_before_what_follows_from_it(tmp_path: Path) -> None:
    ordered = [type(each).__name__ for each in Participants(reversed(callbacks(tmp_path))).all]
    assert ordered == [
        "FaultInjector",
        "GradientMonitor",
        "StepGuard",
        "GradientClipping",
        "WeightPenalty",
        "LRSchedule",
        "FlightRecorder",
        "Rollback",
    ]
    assert [phase.name for phase in sorted(Phase)] == list(Phase.__members__)


def test_a_step_calls_only_callbacks_that_take_part_in_a_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(self: Any, *args: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} was called for nothing")

    # Who logs anything at all is asked, on log steps, for each of these.
    defaults = {"logs_now", "state_key", "device_scalars", "device_payloads", "host_scalars"}
    for name, member in vars(StepHooks).items():
        if callable(member) and not name.startswith("__") and name not in defaults:
            monkeypatch.setattr(StepHooks, name, idle)
    batches = [*make_batches(6), poison(make_batches(1)[0]), *make_batches(6, seed=1)]
    guard = StepGuard()
    every = [each for each in callbacks(tmp_path) if not isinstance(each, (StepGuard, FaultInjector))]
    fit(NormNet(), batches, [guard, *every])
    assert guard.skipped_steps == 1


def test_hooks_of_an_instance_take_part() -> None:
    seen: list[Any] = []
    hooks = StepHooks()
    hooks.observe = seen.append  # type: ignore[method-assign]
    participants = Participants([hooks, StepHooks()])
    assert participants["observe"] == (hooks,)
    assert participants["clip"] == ()
