"""Losses of unusual shapes, and callbacks that are used twice or in vain."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from stability_callbacks import (
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    LRSchedule,
    Rollback,
    StepGuard,
    WeightPenalty,
    stability_suite,
)
from stability_callbacks.clipping import NormClip, ValueClip
from stability_callbacks.detection import NonFinite, Spike
from stability_callbacks.engine._usage import warn_of_anomaly_detection
from stability_callbacks.schedules import WarmupCosine
from tests.models import NormNet, TwoOptimizers, assert_same_bits, fit, make_batches, poison, training_state


class Shaped(NormNet):
    """Its loss has one element, and dimensions."""

    shape: tuple[int, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).reshape(self.shape)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_loss_of_one_element_may_have_dimensions(shape: tuple[int, ...]) -> None:
    def train(shape: tuple[int, ...]) -> tuple[Any, StepGuard]:
        torch.manual_seed(0)
        model, guard = Shaped(), StepGuard([NonFinite(), Spike()])
        model.shape = shape
        batches = make_batches(6)
        batches[3] = poison(batches[3])
        callbacks = [guard, Rollback(), GradientMonitor(), GradientClipping(NormClip(1.0))]
        return training_state(model, fit(model, batches, callbacks)), guard

    (state, guard), (expected, _) = train(shape), train(())
    assert guard.skipped_steps == 1
    assert_same_bits(state["model"], expected["model"])


class VectorLoss(TwoOptimizers):
    """Sends a vector of losses backward, with weights."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(net(x), y, reduction="none")
            self.manual_backward(losses, gradient=torch.full_like(losses, 1 / len(losses)))
            optimizer.step()


def test_a_vector_of_losses_shows_its_nan() -> None:
    guard = StepGuard()
    batches = make_batches(5)
    batches[2][0][0, 0] = float("nan")  # of one sample alone
    fit(VectorLoss(), batches, [guard, Rollback()])
    assert guard.skipped_steps == 2


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (lambda: StepGuard([NonFinite(), Spike()]), "2 guards"),
        (lambda: GradientClipping(ValueClip(1.0)), "2 clippings"),
        (lambda: Rollback(keep=1), None),
        (lambda: LRSchedule(WarmupCosine()), None),
        (lambda: GradientMonitor(per="parameter"), None),
        (lambda: WeightPenalty(l2=0.1), None),
    ],
)
def test_what_is_used_twice_is_said(extra: Any, what: str | None) -> None:
    callbacks = [each for each in stability_suite("mlp") if not isinstance(each, Rollback)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(NormNet(), make_batches(2), [*callbacks, extra()])
    told = [str(each.message) for each in caught if "among the trainer's callbacks" in str(each.message)]
    assert len(told) == (what is not None)
    assert what is None or what in told[0]


def test_two_recorders_are_said(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"2 recorders .*each incident is recorded by each"):
        fit(NormNet(), make_batches(2), [FlightRecorder(tmp_path / "a"), FlightRecorder(tmp_path / "b")])


def test_a_penalty_on_nothing_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"parameters='encodr'.*matches no parameter.*net\.0\.weight"):
        fit(NormNet(), make_batches(2), [WeightPenalty(l1=0.1, parameters="encodr")])


@pytest.mark.parametrize(("processes", "on", "warns"), [(2, True, True), (1, True, False), (4, False, False)])
def test_anomaly_detection_over_several_processes_is_warned_of(processes: int, on: bool, warns: bool) -> None:
    trainer = SimpleNamespace(world_size=processes)
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(on):
        warnings.simplefilter("always")
        warn_of_anomaly_detection(trainer)  # type: ignore[arg-type]
    told = [str(each.message) for each in caught if "bad steps can't be skipped" in str(each.message)]
    assert len(told) == warns


def test_training_asks_for_anomaly_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("stability_callbacks.engine._lifecycle.warn_of_anomaly_detection", asked.append)
    fit(NormNet(), make_batches(2), [StepGuard()])
    assert len(asked) == 1
