"""Optimizers and parameters that change during training are protected as before; and who may read learning rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from stability_callbacks import FlightRecorder, GradientClipping, GradientMonitor, LRSchedule, Rollback, StepGuard
from stability_callbacks.clipping import AdaGC, NormClip, PerGroup
from stability_callbacks.detection import NonFinite, Spike
from stability_callbacks.schedules import WarmupConstant, WarmupLinear
from tests.models import NormNet, assert_same_bits, loader_of, make_batches, make_trainer, poison, training_state

AT = 4
"""The batch before which, or in whose step, something changes."""


def replace_optimizers(trainer: pl.Trainer, model: Any) -> None:
    trainer.strategy.setup_optimizers(trainer)


def other_class(trainer: pl.Trainer, model: Any) -> None:
    model.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    trainer.strategy.setup_optimizers(trainer)


def replace_parameter(trainer: pl.Trainer, model: Any) -> None:
    [group] = trainer.optimizers[0].param_groups
    old = model.net[3].weight
    new = model.net[3].weight = nn.Parameter(old.detach().clone() * 0.5)
    group["params"] = [new if each is old else each for each in group["params"]]
    trainer.optimizers[0].state.pop(old, None)


def grow(trainer: pl.Trainer, model: Any) -> None:
    torch.manual_seed(1)
    model.net[3] = nn.Linear(8, 5)
    trainer.strategy.setup_optimizers(trainer)


def add_group(trainer: pl.Trainer, model: Any) -> None:
    torch.manual_seed(1)
    model.net.append(nn.BatchNorm1d(3))
    trainer.optimizers[0].add_param_group({"params": list(model.net[4].parameters()), "lr": 0.01})


CHANGES: dict[str, Callable[[pl.Trainer, Any], None]] = {
    "optimizers": replace_optimizers,
    "another class": other_class,
    "parameter": replace_parameter,
    "grown": grow,
    "group": add_group,
}


class Changes(pl.Callback):
    """Changes something when so many steps were good, on its own count, and at another place in the step."""

    def __init__(self, change: Any, at: int, hook: str = "on_train_batch_start") -> None:
        self.change = change
        self.at = at
        self.steps = 0
        setattr(self, hook, self.act)

    def act(self, trainer: pl.Trainer, model: Any, *arguments: Any) -> None:
        self.steps += 1
        if self.steps == self.at + 1:
            self.change(trainer, model)


def train(batches: Any, callbacks: list[pl.Callback], **arguments: Any) -> tuple[Any, pl.Trainer]:
    torch.manual_seed(0)
    model = NormNet()
    trainer = make_trainer(callbacks, **arguments)
    trainer.fit(model, loader_of(batches))
    return training_state(model, trainer), trainer


def protection() -> list[pl.Callback]:
    return [
        GradientClipping([PerGroup({"bias": NormClip(0.05), ".*": AdaGC(warmup_steps=2)}), NormClip(0.1)]),
        StepGuard([NonFinite(), Spike(min_history=8)]),
    ]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_batch_skipped_after_the_change_might_as_well_not_have_been(name: str, hook: str, ours_first: bool) -> None:
    def run(batches: Any) -> tuple[Any, StepGuard]:
        clipping, guard = protection()
        changes = Changes(CHANGES[name], AT, hook)
        callbacks = [clipping, guard, changes] if ours_first else [changes, clipping, guard]
        state, _ = train(batches, callbacks)
        return state, guard  # type: ignore[return-value]

    batches = make_batches(10)
    expected, without = run([*batches[:6], *batches[8:]])
    skipped, guard = run([*batches[:6], poison(batches[6]), poison(batches[7]), *batches[8:]])
    assert (without.skipped_steps, guard.skipped_steps) == (0, 2)
    assert_same_bits(skipped, expected)
    assert_same_bits(guard.state_dict()["detectors"], without.state_dict()["detectors"])


def test_a_batch_in_which_the_change_happens_is_judged() -> None:
    """The optimizers are replaced after our hook of the batch's start: its own step is protected nevertheless."""
    batches = make_batches(8)
    guard = StepGuard()
    state, _ = train([*batches[:AT], poison(batches[AT]), *batches[AT + 1 :]], [guard, Changes(replace_optimizers, AT)])
    assert guard.skipped_steps == 1
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_rollback_after_the_change_goes_back_to_the_change(name: str, storage: str, tmp_path: Path) -> None:
    class Spoils(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, model: Any, *arguments: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    model.net[0].weight.fill_(float("nan"))

    batches = make_batches(10)
    rollback = Rollback(
        every_n_steps=100, patience=2, lr_factor=1.0, lr_recovery_steps=0, storage=storage, dirpath=tmp_path
    )
    healed, _ = train(batches, [Changes(CHANGES[name], AT), Spoils(), StepGuard(), rollback])
    assert rollback.rollbacks == 1
    # Found after batch 6, whose step is skipped; back to the state in which batch 4 began.
    expected, _ = train([*batches[:4], *batches[7:]], [Changes(CHANGES[name], AT)])
    assert_same_bits(healed, expected)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == (["snapshot-step=4.ckpt"] if storage == "disk" else [])


def test_everything_else_goes_on_with_another_optimizer(tmp_path: Path) -> None:
    callbacks = [
        FlightRecorder(tmp_path, trace=False),
        GradientMonitor(),
        LRSchedule(WarmupConstant(warmup=8)),
        GradientClipping(NormClip(0.1)),
        StepGuard(),
    ]
    batches = make_batches(8)
    batches[6] = poison(batches[6])
    _, trainer = train(batches, [Changes(other_class, AT), *callbacks])
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert callbacks[2].state_dict()["attempted_steps"] == [8]
    assert (tmp_path / "incidents.jsonl").read_text().count('"AdamW"') == 1


def test_optimizers_that_went_are_left_as_they_were() -> None:
    gone: list[Any] = []

    def change(trainer: pl.Trainer, model: Any) -> None:
        gone.extend(trainer.optimizers)
        trainer.strategy.setup_optimizers(trainer)

    train(make_batches(6), [StepGuard(), LRSchedule(WarmupConstant(warmup=9)), Changes(change, 3)])
    [optimizer] = gone
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer.param_groups[0]["lr"] == 0.05


# ---- learning rates between steps


class Notes(torch.optim.SGD):
    """Notes the rates in force in its arithmetic."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.rates: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.rates.append([group["lr"] for group in self.param_groups])
        super().step()
        return loss


class Finetuned(NormNet):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)

    def loss(self, batch: Any) -> Any:
        return super().loss((self.backbone(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return Notes([each for each in self.parameters() if each.requires_grad], lr=0.1)


@pytest.mark.parametrize("ours_first", [True, False])
def test_finetuning_reads_the_base_rate(ours_first: bool) -> None:
    """Lightning's callback gives the backbone half of the rate that it finds in the group."""
    finetuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.0, backbone_initial_ratio_lr=0.5, should_align=False
    )
    schedule = WarmupLinear(warmup=0, end=0.0, total_steps=10)
    callbacks = [LRSchedule(schedule), finetuning] if ours_first else [finetuning, LRSchedule(schedule)]
    torch.manual_seed(0)
    trainer = make_trainer(callbacks, max_epochs=2)
    trainer.fit(Finetuned(), loader_of(make_batches(5)))
    rates = trainer.optimizers[0].rates
    assert [step[0] for step in rates] == [0.1 * schedule(step, 10) for step in range(10)]
    assert [step[1] for step in rates[5:]] == [0.05 * schedule(step, 10) for step in range(5, 10)]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.05]
