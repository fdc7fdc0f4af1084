"""Optimizers of other packages: state outside of ``optimizer.state``, no learning rate, no ``Optimizer.__init__``.

The packages are in the extra ``optimizers``; what is not installed is left out. timm needs torchvision, which is built
for one version of torch; its optimizers are read from their files, without the rest of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from stability_callbacks import GradientClipping, LRSchedule, Rollback, StepGuard, WeightPenalty, stability_suite
from stability_callbacks.schedules import WarmupConstant
from tests.models import TinyModel, assert_same_bits, loader_of, make_batches, make_trainer, poison

# What these packages warn of in their own code is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Make = Callable[[Any], Any]


def of(package: str, name: str, **arguments: Any) -> Make:
    def make(parameters: Any) -> Any:
        return getattr(pytest.importorskip(package), name)(parameters, **arguments)

    return make


def timm(module: str, name: str) -> Any:
    """A class from one file of ``timm.optim``."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    alone = ModuleType("timm_optim_alone")
    alone.__path__ = [str(Path(spec.origin).parent / "optim")]
    sys.modules.setdefault("timm_optim_alone", alone)
    return getattr(importlib.import_module(f"timm_optim_alone.{module}"), name)


def lookahead(parameters: Any) -> Any:
    return pytest.importorskip("pytorch_optimizer").Lookahead(torch.optim.SGD(parameters, lr=0.05, momentum=0.9), k=3)


def torch_optimizer_lookahead(parameters: Any) -> Any:
    package = pytest.importorskip("torch_optimizer")
    return package.Lookahead(package.Yogi(parameters, lr=0.01), k=3)


class NotAnOptimizer:
    """What Lightning takes for one by its shape, its protocol ``Optimizable``; it counts steps in an attribute."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        self.param_groups = self.inner.param_groups
        self.defaults = self.inner.defaults
        self.state = self.inner.state
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.05 / self.count
        self.inner.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups


class CountsBeforehand(torch.optim.Optimizer):
    """Uses a mean of gradients whose weight lies in the group, and a list in which it keeps what it did."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05, "sum": 0.0, "last": [0.0], "scale": torch.ones(())})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["sum"] += 1.0
            group["last"][0] = group["sum"]
            group["scale"].mul_(0.9)
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] * float(group["scale"]) / group["sum"])
        return loss


OPTIMIZERS: dict[str, Make] = {
    "protocol": NotAnOptimizer,
    "group entries": CountsBeforehand,
    "schedulefree AdamW": of("schedulefree", "AdamWScheduleFree", lr=0.01, warmup_steps=3),
    "schedulefree SGD": of("schedulefree", "SGDScheduleFree", lr=0.1, foreach=False),
    "schedulefree RAdam": of("schedulefree", "RAdamScheduleFree", lr=0.01),
    "schedulefree closure": of("schedulefree", "AdamWScheduleFreeClosure", lr=0.01),
    "schedulefree SGD closure": of("schedulefree", "SGDScheduleFreeClosure", lr=0.1, foreach=False),
    "prodigyopt": of("prodigyopt", "Prodigy"),
    "dadaptation Adam": of("dadaptation", "DAdaptAdam"),
    "dadaptation SGD": of("dadaptation", "DAdaptSGD"),
    "lion": of("lion_pytorch", "Lion", lr=0.001),
    "transformers": of("transformers.optimization", "Adafactor"),
    "pytorch_optimizer AdaBelief": of("pytorch_optimizer", "AdaBelief", lr=0.01),
    "pytorch_optimizer Adai": of("pytorch_optimizer", "Adai", lr=0.01),
    "pytorch_optimizer Ranger21": of("pytorch_optimizer", "Ranger21", num_iterations=20, lr=0.01),
    "pytorch_optimizer Prodigy": of("pytorch_optimizer", "Prodigy"),
    "pytorch_optimizer A2Grad": of("pytorch_optimizer", "A2Grad"),
    "pytorch_optimizer SWATS": of("pytorch_optimizer", "SWATS", lr=0.01),
    "pytorch_optimizer Lookahead": lookahead,
    "torch_optimizer Lookahead": torch_optimizer_lookahead,
    "timm Lamb": lambda parameters: timm("lamb", "Lamb")(parameters, lr=0.01),
    "timm Adan": lambda parameters: timm("adan", "Adan")(parameters, lr=0.01),
    "timm Lookahead": lambda parameters: timm("lookahead", "Lookahead")(torch.optim.AdamW(parameters, lr=0.01), k=3),
}


class Net(TinyModel):
    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def on_train_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if hasattr(optimizer, "train"):  # schedule-free ones must be told
            optimizer.train()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


def train(make: Make, batches: Any, callbacks: list[pl.Callback], **arguments: Any) -> pl.Trainer:
    torch.manual_seed(0)
    model = Net(make)
    trainer = make_trainer(callbacks, **arguments)
    trainer.fit(model, loader_of(batches))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return trainer


def everything(trainer: pl.Trainer) -> dict[str, Any]:
    """Weights, state, group entries and counts."""
    [optimizer] = trainer.optimizers
    counts = {name: value for name, value in vars(optimizer).items() if isinstance(value, (int, float))}
    return {
        "model": trainer.lightning_module.state_dict(),
        "state": [optimizer.state.get(each) for group in optimizer.param_groups for each in group["params"]],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "counts": counts,
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_suite_is_invisible_where_nothing_happens(name: str, tmp_path: Path) -> None:
    batches = make_batches(8)
    plain = train(OPTIMIZERS[name], batches, [])
    callbacks = stability_suite("mlp")
    watched = [each for each in callbacks if not isinstance(each, GradientClipping)]
    suite = train(OPTIMIZERS[name], batches, watched, default_root_dir=tmp_path)
    assert_same_bits(everything(suite), everything(plain))


@pytest.mark.parametrize("bad", [[0], [3], [2, 5, 6]], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_batch_might_as_well_not_have_been(name: str, bad: list[int]) -> None:
    batches = make_batches(9)
    expected = train(OPTIMIZERS[name], [batch for index, batch in enumerate(batches) if index not in bad], [])
    poisoned = [poison(batch) if index in bad else batch for index, batch in enumerate(batches)]
    guard = StepGuard()
    skipped = train(OPTIMIZERS[name], poisoned, [guard])
    assert guard.skipped_steps == len(bad)
    assert skipped.global_step == 9
    assert_same_bits(everything(skipped), everything(expected))


class Ruins(pl.Callback):
    """Makes weights, or an entry of the parameter groups, NaN once."""

    def __init__(self, at: int, entry: str | None = None) -> None:
        self.at = at
        self.entry = entry

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step != self.at:
            return
        if self.entry is None:
            with torch.no_grad():
                next(trainer.lightning_module.parameters()).fill_(float("nan"))
        else:
            trainer.optimizers[0].param_groups[0][self.entry] = float("nan")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rollback_puts_all_of_it_back(name: str) -> None:
    """After it training is where it was at the snapshot: equal to a run that goes on from there."""
    batches = make_batches(10)
    rollback = Rollback(every_n_steps=4, patience=2, lr_factor=1.0, lr_recovery_steps=0)
    # The snapshot of step 4 is restored at the end of batch 6, so batches 4, 5 and 6 are as if they had not been.
    healed = train(OPTIMIZERS[name], batches, [Ruins(6), StepGuard(), rollback])
    assert rollback.rollbacks == 1
    expected = train(OPTIMIZERS[name], [*batches[:4], *batches[7:]], [])
    assert_same_bits(_without_rates(everything(healed)), _without_rates(everything(expected)))


@pytest.mark.parametrize(("name", "entry"), [("group entries", "sum"), ("prodigyopt", "d_numerator")])
def test_a_nan_in_a_group_entry_is_found_and_healed(name: str, entry: str) -> None:
    batches = make_batches(10)
    rollback = Rollback(every_n_steps=4, patience=2, lr_factor=1.0, lr_recovery_steps=0)
    # Found when the snapshot of step 8 is due.
    healed = train(OPTIMIZERS[name], batches, [Ruins(8, entry), rollback])
    assert rollback.rollbacks == 1
    expected = train(OPTIMIZERS[name], [*batches[:4], *batches[8:]], [])
    assert_same_bits(everything(healed), everything(expected))


def test_what_others_write_to_groups_is_not_rewound() -> None:
    class Writes(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
            trainer.optimizers[0].param_groups[0]["of a user"] = trainer.global_step

    rollback = Rollback(every_n_steps=4, patience=2)
    trainer = train(CountsBeforehand, make_batches(8), [Writes(), Ruins(6), StepGuard(), rollback])
    assert rollback.rollbacks == 1
    assert trainer.optimizers[0].param_groups[0]["of a user"] == 7
    # Steps 0 to 3 and 7: the skipped one and those before the rollback are undone.
    assert trainer.optimizers[0].param_groups[0]["sum"] == 5.0


class NoRate(torch.optim.SGD):
    """Has no learning rate of its own, as Adafactor with relative steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
        return loss


def test_an_optimizer_without_a_learning_rate_trains_under_the_suite(tmp_path: Path) -> None:
    batches = make_batches(8)
    callbacks = stability_suite("mlp")
    suite = train(NoRate, [*batches[:3], poison(batches[0]), *batches[3:]], callbacks, default_root_dir=tmp_path)
    assert suite.global_step == 9
    plain = train(NoRate, batches, [each for each in stability_suite("mlp") if isinstance(each, GradientClipping)])
    assert_same_bits(everything(suite), everything(plain))


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (LRSchedule(WarmupConstant(warmup=2)), "LRSchedule has nothing to multiply: NoRate"),
        (WeightPenalty(l2=0.1, decoupled=True), "decoupled=True"),
    ],
    ids=["schedule", "penalty"],
)
def test_what_needs_a_learning_rate_says_so_at_train_start(callback: pl.Callback, what: str) -> None:
    with pytest.raises(MisconfigurationException, match=what):
        train(NoRate, make_batches(2), [callback])


def test_users_hooks_fire_around_a_skipped_step_and_the_optimizer_is_left_as_it_was() -> None:
    fired: list[str] = []

    def make(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
        optimizer.register_step_post_hook(lambda *_: fired.append("post"))
        return optimizer

    batches = make_batches(3)
    trainer = train(make, [batches[0], poison(batches[1]), batches[2]], [StepGuard()])
    assert fired == ["pre", "post"] * 3
    assert "step" not in vars(trainer.optimizers[0])
    assert "optimizer_step" not in vars(trainer.strategy)


def test_a_scheduler_made_in_mid_training_finds_an_optimizer_that_it_can_wrap() -> None:
    class Schedules(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizers[0], 1, gamma=0.5)
            elif batch_idx > 2:
                self.scheduler.step()

    batches = make_batches(6)
    batches[4] = poison(batches[4])
    guard = StepGuard()
    skipped = train(lambda each: torch.optim.SGD(each, lr=0.1), batches, [Schedules(), guard])
    assert guard.skipped_steps == 1
    assert skipped.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**3


def _without_rates(state: dict[str, Any]) -> dict[str, Any]:
    for group in state["groups"]:
        group.pop("lr", None)
    return state
