"""What the suite recommends, and that it touches nothing unless asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from stability_callbacks import (
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    Initialization,
    LRSchedule,
    Rollback,
    StepGuard,
    stability_suite,
)
from stability_callbacks.clipping import AGC, NormClip
from stability_callbacks.detection import NonFinite
from stability_callbacks.initialization import Auto
from stability_callbacks.schedules import WarmupCosine
from tests.models import (
    MemoryLogger,
    NormNet,
    TinyModel,
    assert_same_bits,
    fit,
    make_batches,
    poison,
    training_state,
)

KINDS = ("mlp", "cnn", "rnn", "transformer")


def only(callbacks: list[Callback], kind: type[Any]) -> Any:
    [found] = [callback for callback in callbacks if isinstance(callback, kind)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_it_protects_and_no_more(kind: str) -> None:
    callbacks = stability_suite(kind)
    assert {type(callback) for callback in callbacks} == {
        GradientMonitor,
        GradientClipping,
        StepGuard,
        Rollback,
        FlightRecorder,
    }
    *unit_wise, rule = only(callbacks, GradientClipping).rules
    assert isinstance(rule, NormClip)
    assert rule.max_norm == 1.0
    assert len(unit_wise) == (1 if kind == "cnn" else 0)
    [detector] = only(callbacks, StepGuard).detectors
    assert isinstance(detector, NonFinite)


class ConvNet(TinyModel):
    """Ends in its classifier; the optimizer notes the gradients that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
        self.classifier = nn.Linear(4, 3)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.classifier(self.body(batch[0].unsqueeze(1))), batch[1])

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        super().optimizer_step(*arguments, **keywords)
        self.gradients = {name: parameter.grad.clone() for name, parameter in self.named_parameters()}


def test_a_cnn_is_clipped_unit_by_unit_except_in_its_classifier() -> None:
    """The reference is AGC with the classifier's name."""
    gradients = []
    for rule in (None, [AGC(exclude=["^classifier"]), NormClip(1.0)], NormClip(1.0)):
        torch.manual_seed(0)
        model = ConvNet()
        callbacks = stability_suite("cnn") if rule is None else [GradientClipping(rule)]
        fit(model, make_batches(1), callbacks)
        gradients.append(model.gradients)
    ours, named, plain = gradients
    assert_same_bits(ours, named)
    assert not torch.equal(ours["body.4.weight"], plain["body.4.weight"])
    [unit_wise, _] = only(stability_suite("cnn"), GradientClipping).rules
    assert isinstance(unit_wise, AGC)
    assert unit_wise.clip == 0.01


@pytest.mark.parametrize(
    ("kind", "warmup"), [("mlp", 0.05), ("cnn", 0.05), ("rnn", 0.06), ("transformer", 0.1)], ids=KINDS
)
def test_schedule_and_initialization_when_asked(kind: str, warmup: float) -> None:
    callbacks = stability_suite(kind, initialize=True, schedule=True)
    assert len(callbacks) == 7
    schedule = only(callbacks, LRSchedule).schedule
    assert isinstance(schedule, WarmupCosine)
    assert schedule.warmup == warmup
    assert isinstance(only(callbacks, Initialization).policy, Auto)
    assert len(stability_suite(kind, schedule=True)) == len(stability_suite(kind, initialize=True)) == 6


def test_each_call_makes_new_callbacks() -> None:
    one, other = (stability_suite("mlp", initialize=True, schedule=True) for _ in range(2))
    assert not {id(callback) for callback in one} & {id(callback) for callback in other}


@pytest.mark.parametrize("kind", KINDS)
def test_without_being_asked_it_leaves_weights_and_rates_alone(kind: str) -> None:
    batches = make_batches(5)
    states = []
    rules = only(stability_suite(kind), GradientClipping).rules
    for callbacks in ([GradientClipping(rules)], stability_suite(kind)):
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
    assert "net.0.weight" in capsys.readouterr().out  # the table of what was initialized
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
