"""Law 7, as far as the CPU can show it: how often the host asks for a tensor's value in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from stability_callbacks import FlightRecorder, GradientClipping, GradientMonitor, LRSchedule, Rollback, StepGuard
from stability_callbacks.clipping import AutoClip, ClipRule, NormClip, OutlierClip, ValueClip, ZClip
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.schedules import WarmupCosine
from tests.models import Silent, fit, make_batches

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


def plain(fused: bool) -> Silent:
    return Silent(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=fused))


class Counter(pl.Callback):
    """Notes how many reads each batch made."""

    def __init__(self) -> None:
        self.reads = 0
        self.per_batch: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.reads = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.per_batch.append(self.reads)


@contextmanager
def counting(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in READS:
            original = getattr(Tensor, name)

            def counted(self: Tensor, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                counter.reads += 1
                return _original(self, *args, **kwargs)

            patch.setattr(Tensor, name, counted)
        yield


def reads_per_batch(fused: bool, callbacks: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counter = Counter()
    with counting(counter, monkeypatch):
        # The counter stands last, so that what our callbacks do at the end of a batch is counted.
        fit(plain(fused), make_batches(31), [*callbacks, counter], logger=CSVLogger(tmp_path), log_every_n_steps=10)
    return counter.per_batch


def suite(rule: ClipRule) -> list[Any]:
    return [
        LRSchedule(WarmupCosine()),
        GradientMonitor(),
        GradientClipping(rule),
        StepGuard([NonFinite(), Spike(), InputRange(50.0)]),
        Rollback(every_n_steps=10),
        FlightRecorder(),
    ]


@pytest.mark.parametrize(
    "rule",
    [NormClip(1.0), ValueClip(0.1), AutoClip(50), ZClip(warmup_steps=3), OutlierClip(warmup_steps=3)],
    ids=repr,
)
def test_a_fused_optimizer_is_never_waited_for_between_log_steps(
    rule: ClipRule, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = reads_per_batch(True, [], tmp_path, monkeypatch)
    ours = reads_per_batch(True, suite(rule), tmp_path, monkeypatch)
    extra = [count - base for count, base in zip(ours, bare, strict=True)]
    # The first step decides on the host, since the optimizer has no state yet.
    between = [count for step, count in enumerate(extra) if step > 0 and (step + 1) % 10]
    assert between == [0] * len(between)
    assert extra[9] > 0  # or nothing was counted at all


def test_other_optimizers_are_waited_for_once_a_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = reads_per_batch(False, [], tmp_path, monkeypatch)
    ours = reads_per_batch(False, suite(NormClip(1.0)), tmp_path, monkeypatch)
    extra = [count - base for count, base in zip(ours, bare, strict=True)]
    assert [count for step, count in enumerate(extra) if (step + 1) % 10] == [1] * 28


def test_observers_alone_never_wait_between_log_steps(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = reads_per_batch(False, [], tmp_path, monkeypatch)
    callbacks = [LRSchedule(WarmupCosine()), GradientMonitor(), GradientClipping(NormClip(1.0)), FlightRecorder()]
    ours = reads_per_batch(False, callbacks, tmp_path, monkeypatch)
    extra = [count - base for count, base in zip(ours, bare, strict=True)]
    assert [count for step, count in enumerate(extra) if (step + 1) % 10] == [0] * 28
