"""What the suite recommends, and that it touches nothing unless asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from stability_callbacks import (
    GradientClipping,
    GradientMonitor,
    Initialization,
    LRSchedule,
    StepGuard,
    stability_suite,
)
from stability_callbacks.clipping import NormClip
from stability_callbacks.detection import NonFinite
from stability_callbacks.initialization import Auto
from stability_callbacks.schedules import WarmupCosine
from tests.models import MemoryLogger, NormNet, assert_same_bits, fit, make_batches, poison, training_state

KINDS = ("mlp", "cnn", "rnn", "transformer")


def only(callbacks: list[Callback], kind: type[Any]) -> Any:
    [found] = [callback for callback in callbacks if isinstance(callback, kind)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_it_protects_and_no_more(kind: str) -> None:
    callbacks = stability_suite(kind)
    assert {type(callback) for callback in callbacks} == {GradientMonitor, GradientClipping, StepGuard}
    [rule] = only(callbacks, GradientClipping).rules
    assert isinstance(rule, NormClip)
    assert rule.max_norm == 1.0
    [detector] = only(callbacks, StepGuard).detectors
    assert isinstance(detector, NonFinite)


@pytest.mark.parametrize(
    ("kind", "warmup"), [("mlp", 0.05), ("cnn", 0.05), ("rnn", 0.06), ("transformer", 0.1)], ids=KINDS
)
def test_schedule_and_initialisation_when_asked(kind: str, warmup: float) -> None:
    callbacks = stability_suite(kind, initialize=True, schedule=True)
    assert len(callbacks) == 5
    schedule = only(callbacks, LRSchedule).schedule
    assert isinstance(schedule, WarmupCosine)
    assert schedule.warmup == warmup
    assert isinstance(only(callbacks, Initialization).policy, Auto)
    assert len(stability_suite(kind, schedule=True)) == len(stability_suite(kind, initialize=True)) == 4


def test_each_call_makes_new_callbacks() -> None:
    one, other = (stability_suite("mlp", initialize=True, schedule=True) for _ in range(2))
    assert not {id(callback) for callback in one} & {id(callback) for callback in other}


@pytest.mark.parametrize("kind", KINDS)
def test_without_being_asked_it_leaves_weights_and_rates_alone(kind: str) -> None:
    batches = make_batches(5)
    states = []
    for callbacks in ([GradientClipping(NormClip(1.0))], stability_suite(kind)):
        torch.manual_seed(0)
        model = NormNet()
        states.append(training_state(model, fit(model, batches, callbacks)))
    assert_same_bits(*states)


def test_a_run_that_asks_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    logger, model = MemoryLogger(), NormNet()
    before = model.net[0].weight.clone()
    batches = [*make_batches(4), poison(make_batches(1)[0]), *make_batches(4)]
    callbacks = stability_suite("mlp", initialize=True, schedule=True)
    fit(model, batches, callbacks, logger=logger)
    assert "net.0.weight" in capsys.readouterr().out  # the table of what was initialised
    assert not torch.equal(model.net[0].weight, before)
    assert only(callbacks, StepGuard).skipped_steps == 1
    assert logger.names() >= {"lr/SGD", "grad_norm/total", "stability/skipped_steps", "stability/clip_coefficient"}
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("kind", ["resnet", "MLP", "", None, 3])
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="`kind` must be one of 'mlp', 'cnn', 'rnn', 'transformer', got "):
        stability_suite(kind)


@pytest.mark.parametrize("name", ["initialize", "schedule"])
def test_flags_must_be_booleans(name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be True or False, got 'yes' of type str"):
        stability_suite("mlp", **{name: "yes"})


def test_flags_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        stability_suite("mlp", True)  # type: ignore[misc]
