"""What the suite recommends, and that it touches nothing unless asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

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
from stability_callbacks.clipping import AGC, NormClip, OutlierClip
from stability_callbacks.detection import NonFinite
from stability_callbacks.initialization import Auto
from stability_callbacks.schedules import WarmupCosine
from tests.models import (
    MemoryLogger,
    NormNet,
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
    [rule] = only(callbacks, GradientClipping).rules
    assert isinstance(rule, OutlierClip)
    assert (rule.min_threshold, rule.learn_steps) == ((0.0, None) if kind in ("mlp", "cnn") else (1.0, 16))
    [detector] = only(callbacks, StepGuard).detectors
    assert isinstance(detector, NonFinite)


class Scaled(NormNet):
    """Its loss is in another unit; at one step the gradient is a hundred thousand times as large."""

    unit = 1.0
    explodes_at: int | None = None

    def loss(self, batch: Any) -> Tensor:
        exploded = self.global_step == self.explodes_at
        return super().loss(batch) * self.unit * (1e5 if exploded else 1.0)


def train(kind: str | None, unit: float, explodes_at: int | None = None, rule: Any = None) -> Any:
    torch.manual_seed(0)
    model = Scaled(lambda parameters: torch.optim.SGD(parameters, lr=0.02 / unit, momentum=0.9))
    model.unit, model.explodes_at = unit, explodes_at
    callbacks = [] if kind is None else stability_suite(kind)
    if rule is not None:
        callbacks = [GradientClipping(rule)]
    return training_state(model, fit(model, make_batches(60), callbacks))


@pytest.mark.parametrize(
    ("kind", "unit"),
    [("mlp", 0.01), ("mlp", 1.0), ("cnn", 0.01), ("cnn", 1.0), ("rnn", 0.01), ("transformer", 0.01)],
)
def test_a_sound_run_goes_on_to_the_bit(kind: str, unit: float) -> None:
    assert_same_bits(train(kind, unit), train(None, unit))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_in_large_units_is_trained_all_the_same(kind: str) -> None:
    """In units in which a gradient of norm 1 is next to nothing."""
    torch.manual_seed(0)
    before = NormNet().net[0].weight.detach()
    moved, plain, clipped = (
        float((state["model"]["net.0.weight"] - before).norm())
        for state in (train(kind, 1e4), train(None, 1e4), train(None, 1e4, rule=NormClip(1.0)))
    )
    assert moved > 0.5 * plain
    assert clipped < 0.1 * plain


def test_norm_1_and_agc_would_not_leave_it_alone() -> None:
    """Or the test above could not fail."""
    plain = train(None, 1.0)["model"]["net.0.weight"]
    for rule in (NormClip(0.1), AGC(exclude_last_layer=True)):
        assert not torch.equal(train(None, 1.0, rule=rule)["model"]["net.0.weight"], plain)


@pytest.mark.parametrize("step", [0, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_an_explosion_hardly_moves_the_weights(kind: str, step: int) -> None:
    def distance(one: Any, other: Any) -> float:
        return max(float((one["model"][name] - other["model"][name]).abs().max()) for name in names)

    calm = train(None, 1.0)
    names = [name for name in calm["model"] if name.startswith("net") and name.endswith(("weight", "bias"))]
    assert distance(train(None, 1.0, step), calm) > 100
    assert distance(train(kind, 1.0, step), calm) < 3


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
