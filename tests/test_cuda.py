"""What only a GPU can show: verdicts on the device, host waits, loss scaling. Skipped where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from stability_callbacks import (
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    LRSchedule,
    Rollback,
    StepGuard,
    TrainingDivergedError,
)
from stability_callbacks.clipping import NormClip, ValueClip
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.diagnosis import read_incidents
from stability_callbacks.schedules import WarmupCosine
from tests.models import NormNet, ResumableLoader, Silent, assert_same_bits, fit, make_batches, poison, training_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True, fused=True),
}


def run(optimizer: str, batches: list[Any], callbacks: list[Any], **arguments: Any) -> tuple[Any, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    model = NormNet(OPTIMIZERS[optimizer])
    trainer = fit(model, batches, callbacks, accelerator="gpu", **arguments)
    return training_state(model, trainer), trainer


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skip_is_a_perfect_no_op(optimizer: str, precision: str) -> None:
    clean = make_batches(8)
    bad = [poison(clean[0]), *clean[:3], poison(clean[1], float("inf")), poison(clean[2]), *clean[3:]]
    guard = StepGuard()
    clip = lambda: GradientClipping(NormClip(0.5))  # noqa: E731
    healed, _ = run(optimizer, bad, [guard, clip(), GradientMonitor()], precision=precision)
    expected, _ = run(optimizer, clean, [clip()], precision=precision)
    assert guard.skipped_steps == 3
    assert_same_bits(healed, expected)


@pytest.mark.parametrize("rule", [NormClip(0.5), ValueClip(0.01)], ids=["norm", "value"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fp16_skips_and_clips_with_a_loss_scale(optimizer: str, rule: Any) -> None:
    clean = make_batches(6)
    bad = [*clean[:2], poison(clean[1]), *clean[2:]]
    guard = StepGuard()
    healed, _ = run(optimizer, bad, [guard, GradientClipping(rule)], precision="16-mixed")
    assert guard.skipped_steps >= 1
    assert all(value.isfinite().all() for value in healed["model"].values() if value.is_floating_point())
    if "fused" not in optimizer:
        argument = {"value": rule.max_value} if isinstance(rule, ValueClip) else {"norm": rule.max_norm}
        [(kind, bound)] = argument.items()
        ours, _ = run(optimizer, clean, [StepGuard(), GradientClipping(rule)], precision="16-mixed")
        theirs, _ = run(
            optimizer, clean, [], precision="16-mixed", gradient_clip_val=bound, gradient_clip_algorithm=kind
        )
        assert_same_bits(ours["optimizers"], theirs["optimizers"])


def test_divergence_on_the_device_is_found_at_a_log_step() -> None:
    batches = [poison(batch) for batch in make_batches(40)]
    good = make_batches(2)
    with pytest.raises(TrainingDivergedError, match="10 steps in a row"):
        run("adamw-fused", [*good, *batches], [StepGuard(max_consecutive_skips=10)], log_every_n_steps=15)


class Waits(pl.Callback):
    """Counts the host's waits for the device, batch by batch."""

    def __init__(self) -> None:
        self.seen: list[warnings.WarningMessage] = []
        self.counts: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        total = sum("synchronizing CUDA operation" in str(warning.message) for warning in self.seen)
        self.counts.append(total - sum(self.counts))


def plain(fused: bool) -> Silent:
    return Silent(lambda p: torch.optim.AdamW(p, fused=fused))


def waits_per_step(fused: bool, callbacks: list[Any], tmp_path: Any) -> list[int]:
    counter = Waits()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counter.seen = caught
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fit(
                plain(fused),
                ResumableLoader([(x.cuda(), y.cuda()) for x, y in make_batches(41)]),
                [*callbacks, counter],
                accelerator="gpu",
                logger=CSVLogger(tmp_path),
                log_every_n_steps=10,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counter.counts


def suite() -> list[Any]:
    return [LRSchedule(WarmupCosine()), GradientMonitor(), GradientClipping(NormClip(1.0)), StepGuard()]


def recovery(directory: Any) -> list[Any]:
    detectors = [NonFinite(), Spike(), InputRange(50.0)]
    return [*suite()[:3], StepGuard(detectors), Rollback(every_n_steps=10), FlightRecorder(directory)]


def test_fused_optimizers_never_wait_between_log_steps(tmp_path: Any) -> None:
    bare = waits_per_step(True, [], tmp_path)
    for callbacks, at_logs in ((suite(), 1), (recovery(tmp_path), None)):
        ours = waits_per_step(True, callbacks, tmp_path)
        extra = [count - base for count, base in zip(ours, bare, strict=True)]
        between = [count for step, count in enumerate(extra) if (step + 1) % 10 and step > 0]
        assert between == [0] * len(between), extra
        assert at_logs is None or max(extra) <= at_logs, extra


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rollback_goes_on_as_if_nothing_had_been(optimizer: str, precision: str) -> None:
    class Ruin(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = float("nan")

    good = make_batches(8)
    met = [*good[:6], good[0], *good[4:]]  # the state of step 4 is restored, so batches 4 and 5 are met again
    rollback = Rollback(every_n_steps=4, patience=2, lr_factor=1.0)
    scaled = {"precision": precision, "log_every_n_steps": 1}
    healed, _ = run(optimizer, met, [StepGuard(), rollback, Ruin()], **scaled)
    clean, _ = run(optimizer, good, [StepGuard()], **scaled)
    assert rollback.rollbacks == 1
    assert_same_bits(healed, clean)


def test_the_cause_of_a_bad_step_is_found_on_the_device(tmp_path: Any) -> None:
    batches = make_batches(5)
    batches[2] = poison(batches[2])
    run("adamw-fused", batches, [StepGuard(), FlightRecorder(tmp_path)], log_every_n_steps=1)
    [incident] = read_incidents(tmp_path / "incidents.jsonl")
    assert (incident.step, incident.evidence["phase"]) == (2, "input")


def test_other_optimizers_wait_at_most_once_a_step(tmp_path: Any) -> None:
    bare = waits_per_step(False, [], tmp_path)
    ours = waits_per_step(False, suite(), tmp_path)
    extra = [count - base for count, base in zip(ours, bare, strict=True)]
    assert max(extra) == 1, extra


def test_deferred_metrics_all_arrive(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    pl.seed_everything(0, verbose=False)
    fit(plain(False), make_batches(25), suite(), accelerator="gpu", logger=logger, log_every_n_steps=5)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    position = rows[0].split(",").index("step")
    assert [row.split(",")[position] for row in rows[1:]] == ["4", "9", "14", "19", "24"]
