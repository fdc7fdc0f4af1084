"""The schedule as a multiplier: beside a scheduler of the user's own, in every way of counting steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from stability_callbacks import GradientClipping, GradientMonitor, LRSchedule, StepGuard
from stability_callbacks.clipping import NormClip
from stability_callbacks.schedules import Scaled, Schedule, WarmupConstant, WarmupCosine, WarmupInverseSqrt
from tests.models import (
    MemoryLogger,
    NormNet,
    ResumableLoader,
    TinyModel,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    make_trainer,
    poison,
    training_state,
)


class SpySGD(torch.optim.SGD):
    """Notes the rates in force in its arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen.append([float(group["lr"]) for group in self.param_groups])
        super().step()
        return loss


class Net(TinyModel):
    """A layer under an optimizer that notes its rates, and a scheduler that the test chooses."""

    def __init__(self, scheduler: Callable[[Any], Any] | None = None, lr: Any = 0.1) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.make_scheduler = scheduler
        self.lr = lr

    def loss(self, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss.detach(), logger=False)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = SpySGD(self.parameters(), lr=self.lr)
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        config = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def rates(trainer: pl.Trainer, group: int = 0) -> list[float]:
    """The rates that the trainer's first optimizer used, step by step."""
    return [seen[group] for seen in trainer.optimizers[0].seen]  # type: ignore[attr-defined]


def multiples(schedule: Schedule, steps: int, total: int | None = None) -> list[float]:
    return [schedule(step, total) for step in range(steps)]


# ---- the multiplier


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_schedule_equals_torchs_lambda_lr_bit_for_bit(groups: int, accumulate: int) -> None:
    class Reference(NormNet):
        def __init__(self, scheduled: bool) -> None:
            super().__init__()
            self.scheduled = scheduled

        def configure_optimizers(self) -> Any:
            layers = [self.net[:2], self.net[3]]
            together = [[p for layer in layers for p in layer.parameters()]]
            parameters = together if groups == 1 else [list(layer.parameters()) for layer in layers]
            optimizer = torch.optim.SGD(
                [{"params": group, "lr": 0.3 / (1 + index)} for index, group in enumerate(parameters)], momentum=0.9
            )
            if not self.scheduled:
                return optimizer
            total = self.trainer.estimated_stepping_batches
            scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, int(total)))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    schedule = WarmupCosine(warmup=3, start=0.1, end=0.05)
    states = []
    for scheduled, callbacks in ((True, []), (False, [LRSchedule(schedule)])):
        torch.manual_seed(0)
        model = Reference(scheduled)
        fit(model, make_batches(10), callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
        states.append(model.state_dict())
    assert_same_bits(*states)


def test_the_first_step_is_scaled_and_the_last_reaches_the_end() -> None:
    schedule = WarmupCosine(warmup=2, start=0.25, end=0.5)
    trainer = fit(Net(), make_batches(8), [LRSchedule(schedule)])
    assert rates(trainer) == pytest.approx([0.1 * multiple for multiple in multiples(schedule, 8, 8)], rel=1e-12)
    assert rates(trainer)[:3] == pytest.approx([0.025, 0.0625, 0.1])
    assert schedule(8, 8) == 0.5
    assert rates(trainer)[-1] == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "steps", "total"),
    [
        ({"max_epochs": 2}, 12, 12),
        ({"max_epochs": 3, "max_steps": 7}, 7, 7),
        ({"max_epochs": -1, "max_steps": 7}, 7, 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4, 4),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 6),
    ],
    ids=str,
)
def test_the_total_is_that_of_the_trainer(arguments: dict[str, Any], steps: int, total: int) -> None:
    schedule = WarmupCosine(warmup=0.5)
    trainer = fit(Net(), make_batches(6), [LRSchedule(schedule)], **arguments)
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, steps, total)]


def test_the_schedules_own_total_wins() -> None:
    schedule = WarmupCosine(warmup=2, total_steps=5)
    trainer = fit(Net(), make_batches(8), [LRSchedule(schedule)])
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 8)]
    assert rates(trainer)[5:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("max_steps", "total"), [(-1, 7 + 7 + 3 + 4 + 4), (20, 20)])
def test_accumulation_that_changes_between_epochs_is_counted_right(max_steps: int, total: int) -> None:
    schedule = WarmupCosine(warmup=0.25)
    accumulation = GradientAccumulationScheduler({0: 1, 2: 3, 3: 2})
    callbacks = [accumulation, LRSchedule(schedule)]
    trainer = fit(Net(), make_batches(7), callbacks, max_epochs=5, max_steps=max_steps)
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, total, total)]


def test_skipped_steps_count_so_that_the_schedule_ends_where_it_should() -> None:
    batches = make_batches(8)
    batches[2] = batches[3] = poison(batches[2])
    schedule = WarmupCosine(warmup=4)
    trainer = fit(Net(), batches, [LRSchedule(schedule), StepGuard()])
    # The arithmetic of a skipped step does not run, so it notes no rate.
    expected = [0.1 * multiple for multiple in multiples(schedule, 8, 8)]
    assert rates(trainer) == [*expected[:2], *expected[4:]]


@pytest.mark.parametrize("guarded", [True, False])
def test_steps_that_a_loss_scaler_skips_count_too(guarded: bool) -> None:
    """The first scale is so large that gradients overflow: the scaler leaves the optimizer out until it has halved."""
    schedule, logger = WarmupCosine(warmup=4, start=0.2), MemoryLogger()
    callbacks = [LRSchedule(schedule), *([StepGuard()] if guarded else [])]
    trainer = fit(Net(), make_batches(8), callbacks, plugins=[fp16(2.0**18)], logger=logger)
    taken = len(trainer.optimizers[0].seen)  # type: ignore[attr-defined]
    assert 0 < taken < 8
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 8, 8)[-taken:]]
    assert callbacks[0].state_dict()["attempted_steps"] == [8]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_gradients_count_too() -> None:
    class ReturnsNone(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    schedule = WarmupCosine(warmup=2)
    trainer = fit(ReturnsNone(), make_batches(5), [LRSchedule(schedule)])
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 5, 5)]


class TwoRates(TinyModel):
    """Manual optimization with two optimizers, the second of which steps in every second batch."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one = nn.Linear(4, 3)
        self.two = nn.Linear(4, 3)
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
            if net is self.two and batch_idx % self.every:
                continue
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SpySGD(self.one.parameters(), lr=0.1), SpySGD(self.two.parameters(), lr=0.4)]


def test_each_optimizer_has_a_clock_of_its_own() -> None:
    schedule, logger = WarmupCosine(warmup=2), MemoryLogger()
    callback = LRSchedule(schedule)
    trainer = fit(TwoRates(every=2), make_batches(8), [callback], logger=logger)
    one, two = ([seen[0] for seen in optimizer.seen] for optimizer in trainer.optimizers)
    assert one == [0.1 * multiple for multiple in multiples(schedule, 8, 8)]
    assert two == [0.4 * multiple for multiple in multiples(schedule, 4, 8)]
    assert callback.state_dict()["attempted_steps"] == [8, 4]
    assert list(logger.values("lr/SpySGD").values()) == one
    assert list(logger.values("lr/SpySGD-1").values()) == two


def test_max_steps_counts_the_steps_of_all_optimizers() -> None:
    schedule = WarmupCosine(warmup=2)
    trainer = fit(TwoRates(), make_batches(8), [LRSchedule(schedule)], max_steps=12)
    expected = multiples(schedule, 6, 6)
    assert [seen[0] for seen in trainer.optimizers[0].seen] == [0.1 * multiple for multiple in expected]
    assert [seen[0] for seen in trainer.optimizers[1].seen] == [0.4 * multiple for multiple in expected]


@pytest.mark.parametrize("shown", [True, False])
def test_rates_that_are_tensors(shown: bool) -> None:
    logger, schedule = MemoryLogger(), WarmupCosine(warmup=2)
    lr = torch.tensor(0.1, dtype=torch.float64)
    constant = None if shown else (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
    trainer = fit(Net(constant, lr=lr), make_batches(6), [LRSchedule(schedule)], logger=logger)
    expected = [0.1 * multiple for multiple in multiples(schedule, 6, 6)]
    assert rates(trainer) == pytest.approx(expected, rel=1e-15)
    assert list(logger.values("lr/SpySGD").values()) == pytest.approx(expected, rel=1e-15)
    assert trainer.optimizers[0].param_groups[0]["lr"] is lr
    assert float(lr) == 0.1


# ---- beside a scheduler of the user's own

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "epoch": lambda optimizer: {"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "epoch"},
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 12),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=12, cycle_momentum=False),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
    "plateau": lambda optimizer: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
        "interval": "step",
        "monitor": "loss",
    },
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_multiplies_the_rate_of_a_scheduler(name: str) -> None:
    schedule, logger = WarmupCosine(warmup=5, start=0.2, end=0.1), MemoryLogger()
    base = rates(fit(Net(SCHEDULERS[name]), make_batches(6), max_epochs=2))
    assert len(set(base)) > 1
    callbacks = [LRSchedule(schedule), LearningRateMonitor("step")]
    trainer = fit(Net(SCHEDULERS[name]), make_batches(6), callbacks, max_epochs=2, logger=logger)
    expected = [rate * multiple for rate, multiple in zip(base, multiples(schedule, 12, 12), strict=True)]
    assert rates(trainer) == expected
    assert list(logger.values("lr/SpySGD").values()) == expected
    assert list(logger.values("lr-SpySGD").values()) == base  # the scheduler reads it back, so it stays the base rate


class ManualScheduler(Net):
    """Manual optimization with a scheduler that Lightning knows, or does not."""

    def __init__(self, scheduler: Callable[[Any], Any], known: bool) -> None:
        super().__init__(scheduler)
        self.automatic_optimization = False
        self.known = known

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        else:
            self.scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = SpySGD(self.parameters(), lr=self.lr)
        assert self.make_scheduler is not None
        made = self.make_scheduler(optimizer)
        self.scheduler = made["scheduler"] if isinstance(made, dict) else made
        return ([optimizer], [self.scheduler]) if self.known else optimizer


MANUAL = [(name, known) for name in SCHEDULERS for known in (True, False) if (name, known) != ("plateau", False)]


@pytest.mark.parametrize(("name", "known"), MANUAL)
def test_the_schedule_composes_with_a_scheduler_stepped_by_hand(name: str, known: bool) -> None:
    schedule = WarmupCosine(warmup=5, start=0.2, end=0.1)
    base = rates(fit(ManualScheduler(SCHEDULERS[name], known), make_batches(12)))
    trainer = fit(ManualScheduler(SCHEDULERS[name], known), make_batches(12), [LRSchedule(schedule)])
    assert rates(trainer) == [rate * multiple for rate, multiple in zip(base, multiples(schedule, 12, 12), strict=True)]


def test_the_schedule_composes_with_rates_set_by_hand() -> None:
    class SetsRates(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.optimizers().param_groups[0]["lr"] = 1.0 / (1 + batch_idx)
            return super().training_step(batch, batch_idx)

    schedule = WarmupCosine(warmup=3, start=0.5)
    trainer = fit(SetsRates(), make_batches(6), [LRSchedule(schedule)])
    assert rates(trainer) == [1.0 / (1 + step) * m for step, m in enumerate(multiples(schedule, 6, 6))]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0 / 6


# ---- what others see


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_monitor_sees_the_effective_rate(ours_first: bool, accumulate: int) -> None:
    logger, schedule = MemoryLogger(), WarmupCosine(warmup=3)
    callbacks = [LRSchedule(schedule), LearningRateMonitor("step")]
    callbacks = callbacks if ours_first else callbacks[::-1]
    batches = make_batches(8 * accumulate)
    trainer = fit(Net(), batches, callbacks, logger=logger, accumulate_grad_batches=accumulate)
    seen = logger.values("lr-SpySGD")
    assert list(seen) == list(range(8))
    assert list(seen.values()) == rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 8, 8)]


def test_the_effective_rate_is_logged_for_each_group() -> None:
    logger, schedule = MemoryLogger(), WarmupCosine(warmup=3)
    trainer = fit(Groups(), make_batches(6), [LRSchedule(schedule)], logger=logger, log_every_n_steps=2)
    assert logger.values("lr/SpySGD/pg1") == {step: rates(trainer)[step] for step in (1, 3, 5)}
    assert logger.values("lr/SpySGD/pg2") == {step: rates(trainer, group=1)[step] for step in (1, 3, 5)}
    assert [seen[0] / seen[1] for seen in trainer.optimizers[0].seen[1:]] == pytest.approx([5.0] * 5)


class Saves(pl.Callback):
    """Saves after some batches, or in the middle of a step."""

    def __init__(self, dirpath: Any) -> None:
        self.dirpath = dirpath
        self.paths: list[Any] = []

    def save(self, trainer: pl.Trainer, *args: Any) -> None:
        self.paths.append(self.dirpath / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    on_train_batch_start = on_before_zero_grad = on_train_batch_end = on_train_end = save


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_checkpoints_hold_the_base_rate_whoever_saves(first: bool, scheduled: bool, tmp_path: Any) -> None:
    saver = Saves(tmp_path)
    callbacks: list[Any] = [LRSchedule(WarmupConstant(warmup=100, start=0.5)), GradientMonitor()]
    callbacks = [saver, *callbacks] if first else [*callbacks, saver]
    constant = (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)) if scheduled else None
    trainer = fit(Net(constant), make_batches(3), callbacks)
    saver.save(trainer)
    assert len(saver.paths) == 3 * 3 + 2
    for path in saver.paths:
        [state] = torch.load(path, weights_only=True)["optimizer_states"]
        assert state["param_groups"][0]["lr"] == 0.1
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_without_the_callback_a_checkpoint_goes_on_at_the_base_rate(tmp_path: Any) -> None:
    saver = Saves(tmp_path)
    fit(Net(), make_batches(3), [LRSchedule(WarmupConstant(warmup=100)), saver])
    trainer = fit(Net(), make_batches(3), max_epochs=2, ckpt_path=saver.paths[-1])
    assert rates(trainer) == [0.1] * 3


def test_on_a_checkpoint_without_the_callback_the_schedule_starts_where_training_is(tmp_path: Any) -> None:
    saver, schedule = Saves(tmp_path), WarmupCosine(warmup=2)
    fit(Net(), make_batches(3), [saver])
    trainer = fit(Net(), make_batches(3), [LRSchedule(schedule)], max_epochs=2, ckpt_path=saver.paths[-1])
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 6, 6)[3:]]
    fit(TwoRates(), make_batches(3), [saver])
    trainer = fit(TwoRates(), make_batches(3), [LRSchedule(schedule)], max_epochs=2, ckpt_path=saver.paths[-1])
    assert [seen[0] for seen in trainer.optimizers[1].seen] == [0.4 * m for m in multiples(schedule, 6, 6)[3:]]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("before", "after"), [(8, 12), (12, 8)])
def test_a_resume_with_another_max_steps_follows_the_new_total(before: int, after: int, tmp_path: Any) -> None:
    schedule, saver = WarmupCosine(warmup=0.25), Saves(tmp_path)
    trainer = make_trainer([LRSchedule(schedule), saver], max_steps=before, max_epochs=-1, limit_train_batches=3)
    trainer.fit(Net(), ResumableLoader(make_batches(3)))
    path = next(path for path in saver.paths if torch.load(path, weights_only=False)["global_step"] == 3)
    resumed = make_trainer([LRSchedule(schedule)], max_steps=after, max_epochs=-1)
    resumed.fit(Net(), ResumableLoader(make_batches(3)), ckpt_path=path)
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, before, before)]
    assert rates(resumed) == [0.1 * multiple for multiple in multiples(schedule, after, after)[3:]]


def test_restarts_start_at_the_peak_again() -> None:
    trainer = fit(Net(), make_batches(8), [LRSchedule(WarmupCosine(warmup=2, cycles=3))])
    assert rates(trainer) == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.1, 0.05, 0.1, 0.05])


def test_a_second_fit_of_the_same_trainer_goes_on_and_one_of_another_starts_anew() -> None:
    callback, schedule = LRSchedule(WarmupInverseSqrt(warmup=4)), WarmupInverseSqrt(warmup=4)
    trainer = fit(Net(), make_batches(3), [callback])
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 3)]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Net(), DataLoader(make_batches(3), batch_size=None))
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(schedule, 6)[3:]]
    assert rates(fit(Net(), make_batches(3), [callback])) == [0.1 * multiple for multiple in multiples(schedule, 3)]
    trainer = fit(TwoRates(every=3), make_batches(3), [callback])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(TwoRates(every=3), DataLoader(make_batches(3), batch_size=None))
    assert callback.state_dict()["attempted_steps"] == [6, 2]


# ---- one for each optimizer or parameter group


class Groups(Net):
    """Weight and bias in parameter groups of their own, with names or without."""

    def __init__(self, *names: str | None) -> None:
        super().__init__()
        self.names = names

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.net.weight], "lr": 0.5}, {"params": [self.net.bias], "lr": 0.1}]
        for group, name in zip(groups, self.names, strict=False):
            if name is not None:
                group["name"] = name
        return SpySGD(groups, lr=0.5)


ONE, OTHER = WarmupCosine(warmup=3), WarmupConstant(warmup=0.5, start=0.2)


@pytest.mark.parametrize(
    ("names", "schedules"),
    [
        (("backbone", "head"), {"backbone": ONE, "head": OTHER}),
        (("backbone", "head"), {"^SpySGD/backbone$": ONE, ".*": OTHER}),
        (("backbone", None), {"pg2": OTHER, ".*": ONE}),
        ((), {"pg1": ONE, "pg2": OTHER}),
    ],
)
def test_parameter_groups_have_schedules_of_their_own(names: Any, schedules: Any) -> None:
    logger = MemoryLogger()
    callbacks = [LRSchedule(schedules), LearningRateMonitor("step")]
    trainer = fit(Groups(*names), make_batches(6), callbacks, logger=logger)
    expected = [0.5 * m for m in multiples(ONE, 6, 6)], [0.1 * m for m in multiples(OTHER, 6, 6)]
    assert (rates(trainer), rates(trainer, 1)) == expected
    assert list(logger.values("lr/SpySGD/pg1").values()) == expected[0]
    # Patterns are searched in the names that LearningRateMonitor logs.
    monitored = [f"lr-SpySGD/{name}" for name in (*names, "pg1", "pg2")[: 2 if names else None] if name]
    assert all(logger.values(name) for name in monitored)


def test_none_leaves_a_group_alone() -> None:
    trainer = fit(Groups("body", "head"), make_batches(6), [LRSchedule({"head": ONE, ".*": None})])
    assert rates(trainer) == [0.5] * 6
    assert rates(trainer, 1) == [0.1 * m for m in multiples(ONE, 6, 6)]


def test_optimizers_have_schedules_of_their_own() -> None:
    trainer = fit(TwoRates(), make_batches(6), [LRSchedule({"^SpySGD$": ONE, "SpySGD-1": Scaled(OTHER, 0.5)})])
    one, two = ([seen[0] for seen in optimizer.seen] for optimizer in trainer.optimizers)
    assert one == [0.1 * m for m in multiples(ONE, 6, 6)]
    assert two == [0.4 * (0.5 * m) for m in multiples(OTHER, 6, 6)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_schedules_of_groups_go_on_after_a_resume(tmp_path: Any) -> None:
    schedules = {"backbone": ONE, "head": OTHER}
    saver = Saves(tmp_path)
    fit(Groups("backbone", "head"), make_batches(3), [LRSchedule(schedules), saver], max_epochs=1)
    resumed = fit(
        Groups("backbone", "head"), make_batches(3), [LRSchedule(schedules)], max_epochs=2, ckpt_path=saver.paths[-1]
    )
    assert rates(resumed) == [0.5 * m for m in multiples(ONE, 6, 6)[3:]]
    assert rates(resumed, 1) == [0.1 * m for m in multiples(OTHER, 6, 6)[3:]]
    keys = {LRSchedule(which).state_key for which in (schedules, dict(schedules), {"head": ONE, ".*": OTHER}, ONE)}
    assert len(keys) == 3


class Unfreezes(pl.Callback):
    """Adds a parameter group in the second epoch, as finetuning callbacks do."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": [pl_module.later], "lr": 0.4, "name": "later"})


class Later(Net):
    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Parameter(torch.ones(3))

    def configure_optimizers(self) -> Any:
        return SpySGD(self.net.parameters(), lr=self.lr)


def test_a_group_that_is_added_later_is_matched_when_it_comes() -> None:
    schedules = {"later": OTHER, ".*": ONE}
    with pytest.raises(MisconfigurationException, match=r"patterns 'later' match no parameter group; .* 'SpySGD'"):
        fit(Later(), make_batches(3), [LRSchedule(schedules), Unfreezes()], max_epochs=2)
    trainer = fit(Later(), make_batches(3), [LRSchedule({".*": ONE}), Unfreezes()], max_epochs=2)
    assert rates(trainer) == [0.1 * m for m in multiples(ONE, 6, 6)]
    assert [seen[1] for seen in trainer.optimizers[0].seen[3:]] == [0.4 * m for m in multiples(ONE, 6, 6)[3:]]
    with pytest.raises(MisconfigurationException, match="no pattern of LRSchedule matches 'SpySGD/later'"):
        fit(Later(), make_batches(3), [LRSchedule({"SpySGD(/pg1)?$": ONE}), Unfreezes()], max_epochs=2)


# ---- wrong use


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        (
            {"tail": ONE, ".*": OTHER},
            "patterns 'tail' match no parameter group; there are: 'SpySGD/body', 'SpySGD/head'",
        ),
        ({"body": ONE}, "no pattern of LRSchedule matches 'SpySGD/head'; patterns: 'body'"),
    ],
)
def test_patterns_that_do_not_fit_the_groups_stop_the_fit_at_its_start(schedules: Any, message: str) -> None:
    model = Groups("body", "head")
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, make_batches(3), [LRSchedule(schedules)])
    assert not model.losses


@pytest.mark.parametrize(
    ("schedules", "error", "message"),
    [
        ({}, ValueError, "`schedule` must be a schedule, .* got {}"),
        ({"(": ONE}, ValueError, "`schedule` must be a regular expression"),
        ({"a": 0.5}, TypeError, r"`schedule\['a'\]` must be a schedule or None, got 0.5"),
        ({1: ONE}, TypeError, "`schedule` must be a regular expression"),
    ],
)
def test_mappings_are_checked_at_once(schedules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LRSchedule(schedules)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_batches(4))


UNKNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "unlimited": (make_batches(4), {"max_epochs": -1}),
    "max_time": (make_batches(4), {"max_epochs": -1, "max_time": {"minutes": 1}}),
    "iterable": (DataLoader(Endless(), batch_size=None), {"max_epochs": 2}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_total_that_cannot_be_known_is_an_error_that_asks_for_it(case: str) -> None:
    batches, arguments = UNKNOWN[case]
    with pytest.raises(MisconfigurationException, match=r"the schedule's `total_steps`, or Trainer\(max_steps=...\)"):
        fit(Net(), batches, [LRSchedule(WarmupCosine())], **arguments)


def test_what_the_error_asks_for_helps() -> None:
    loader = DataLoader(Endless(), batch_size=None)
    given = WarmupCosine(warmup=0.5, total_steps=8)
    trainer = fit(Net(), loader, [LRSchedule(given)], max_epochs=2)
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(given, 8)]
    trainer = fit(Net(), loader, [LRSchedule(WarmupCosine(warmup=0.5))], max_epochs=2, max_steps=8)
    assert rates(trainer) == [0.1 * multiple for multiple in multiples(given, 8)]


def test_schedules_that_need_no_total_do_without() -> None:
    trainer = fit(Net(), DataLoader(Endless(), batch_size=None), [LRSchedule(WarmupConstant(warmup=2))], max_epochs=2)
    assert rates(trainer) == [0.0, 0.05, *[0.1] * 6]


def test_a_warm_up_longer_than_training_is_shortened_with_a_warning() -> None:
    with pytest.warns(
        UserWarning, match="warm-up of 100 steps is longer than training, which has 4; .* shortened to 4"
    ):
        trainer = fit(Net(), make_batches(4), [LRSchedule(WarmupCosine(warmup=100))])
    assert rates(trainer) == pytest.approx([0.0, 0.025, 0.05, 0.075])


@pytest.mark.filterwarnings("ignore:The warm-up of")
def test_fast_dev_run_passes() -> None:
    fit(Net(), make_batches(4), [LRSchedule(WarmupCosine(warmup=100))], fast_dev_run=True)


@pytest.mark.parametrize("schedule", [0.1, None, WarmupCosine, lambda step: 1.0, [WarmupCosine()]])
def test_anything_but_a_schedule_is_refused(schedule: Any) -> None:
    with pytest.raises(TypeError, match=r"`schedule` must be a schedule, such as WarmupCosine\(\), or a mapping"):
        LRSchedule(schedule)


def test_a_schedule_of_the_users_own() -> None:
    class Staircase(Schedule):
        def __call__(self, step: int, total_steps: int | None = None) -> float:
            return 0.5 ** (step // 2)

    trainer = fit(Net(), make_batches(5), [LRSchedule(Staircase())])
    assert rates(trainer) == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_two_schedules_multiply() -> None:
    one, two = WarmupCosine(warmup=2), WarmupConstant(warmup=3, start=0.5)
    trainer = fit(Net(), make_batches(6), [LRSchedule(one), LRSchedule(two), GradientClipping(NormClip())])
    expected = [0.1 * a * b for a, b in zip(multiples(one, 6, 6), multiples(two, 6), strict=True)]
    assert rates(trainer) == pytest.approx(expected, rel=1e-12)


def test_what_a_fit_left_unlogged_is_not_logged_by_the_next() -> None:
    class Fails(SpySGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise ArithmeticError

    class FailsInTheMiddle(Net):
        def configure_optimizers(self) -> Any:
            return Fails(self.parameters(), lr=0.1)

    callback, logger = LRSchedule(WarmupCosine()), MemoryLogger()
    with pytest.raises(ArithmeticError):
        fit(FailsInTheMiddle(), make_batches(2), [callback])
    fit(Net(), make_batches(2), [callback], logger=logger)
    assert logger.names() == {"lr/SpySGD"}


def test_the_state_is_the_number_of_steps_attempted() -> None:
    callback = LRSchedule(WarmupCosine())
    trainer = fit(Net(), make_batches(5), [callback])
    assert callback.state_dict()["attempted_steps"] == [5]
    assert training_state(trainer.lightning_module, trainer)["optimizers"][0]["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("written", "schedule"),
    [
        ("{class_path: WarmupCosine, init_args: {warmup: 0.1}}", WarmupCosine(warmup=0.1)),
        (
            "{head: {class_path: WarmupCosine, init_args: {warmup: 0.1}}, '.*': null}",
            {"head": WarmupCosine(warmup=0.1), ".*": None},
        ),
    ],
)
def test_schedules_come_from_yaml(written: str, schedule: Any) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LRSchedule, "callback")
    config = f"callback: {{class_path: LRSchedule, init_args: {{schedule: {written}}}}}"
    assert repr(parser.instantiate(parser.parse_string(config)).callback.schedule) == repr(schedule)
