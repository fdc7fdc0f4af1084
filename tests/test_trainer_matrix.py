"""The suite under everything that a Trainer can be asked for."""

from __future__ import annotations

import copy
import csv
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

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
from stability_callbacks.clipping import NormClip, ValueClip
from stability_callbacks.schedules import WarmupCosine
from tests.models import (
    EvaluatedNet,
    MemoryLogger,
    assert_same_bits,
    loader_of,
    make_batches,
    make_trainer,
    poison,
    training_state,
)

# Two of a class in one list are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:There are 2 (guards|clippings)")

BATCHES = make_batches(8)
BATCHES[2] = poison(BATCHES[2])


def suite(**settings: Any) -> list[Callback]:
    return stability_suite("mlp", schedule=True, **settings)


def guard_of(callbacks: list[Callback]) -> StepGuard:
    return next(callback for callback in callbacks if isinstance(callback, StepGuard))


def fit(callbacks: list[Callback], model: Any = None, batches: Any = BATCHES, **arguments: Any) -> pl.Trainer:
    """Fit with a validation loader."""
    trainer = make_trainer(callbacks, **arguments)
    model = EvaluatedNet() if model is None else model
    trainer.fit(model, loader_of(batches), DataLoader(make_batches(2, seed=1), batch_size=None))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return trainer


@pytest.mark.parametrize(
    ("arguments", "steps", "skips"),
    [
        ({}, 8, 1),
        ({"fast_dev_run": True}, 1, 0),
        ({"fast_dev_run": 4}, 4, 1),
        ({"accumulate_grad_batches": 4}, 2, 1),
        ({"accumulate_grad_batches": 3, "max_epochs": 2}, 6, 2),
        ({"limit_train_batches": 0.5}, 4, 1),
        ({"max_steps": 5, "max_epochs": -1}, 5, 1),
        ({"max_epochs": 0}, 0, 0),
        ({"limit_train_batches": 0}, 0, 0),
        ({"max_time": {"minutes": 5}}, 8, 1),
        ({"val_check_interval": 3}, 8, 1),
        ({"val_check_interval": 0.5, "max_epochs": 2}, 16, 2),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5, "max_epochs": 2}, 16, 2),
        ({"num_sanity_val_steps": 0}, 8, 1),
        ({"gradient_clip_val": None, "detect_anomaly": False, "deterministic": True}, 8, 1),
        ({"inference_mode": False}, 8, 1),
        ({"benchmark": True, "use_distributed_sampler": False, "profiler": "simple"}, 8, 1),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 16, 2),
        ({"min_epochs": 1, "min_steps": 3}, 8, 1),
        ({"log_every_n_steps": 3}, 8, 1),
        ({"log_every_n_steps": 0}, 8, 1),
        ({"precision": "bf16-mixed"}, 8, 1),
        ({"precision": "bf16-true"}, 8, 1),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_settings_of_the_trainer(
    arguments: dict[str, Any], steps: int, skips: int, caplog: pytest.LogCaptureFixture
) -> None:
    logger, callbacks = MemoryLogger(), suite()
    trainer = fit(callbacks, logger=logger, **arguments)
    assert trainer.global_step == steps
    assert guard_of(callbacks).skipped_steps == skips
    assert trainer.optimizers == [] or trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    every = arguments.get("log_every_n_steps", 1)
    expected = [] if "fast_dev_run" in arguments or not every else list(range(every - 1, steps, every))
    assert list(logger.values("stability/skipped_steps")) == expected


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches() -> None:
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*make_batches(8), strict=True)))
    callbacks, logger = suite(), MemoryLogger()
    trainer = make_trainer(callbacks, overfit_batches=2, max_epochs=3, logger=logger)
    trainer.fit(EvaluatedNet(), DataLoader(data, 8), DataLoader(data, 8))
    assert trainer.global_step == 6
    assert list(logger.values("grad_norm/total")) == list(range(6))


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks: list[Callback] = [*suite(), GradientMonitor(per="total", progress_bar=True)]
    trainer = fit(callbacks, enable_progress_bar=shown)
    assert ("grad_norm/total" in trainer.progress_bar_metrics) is True
    assert ("grad_norm/total" in capsys.readouterr().out) is shown


def test_progress_bar_is_not_used_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(suite(), enable_progress_bar=True)
    assert not [name for name in trainer.progress_bar_metrics if "norm" in name]


# ---- loggers


def test_without_a_logger() -> None:
    callbacks = suite()
    fit(callbacks, logger=False)
    assert guard_of(callbacks).skipped_steps == 1


def test_csv_logger(tmp_path: Path) -> None:
    fit(suite(), logger=CSVLogger(tmp_path, name="", version=""))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    ours = [row for row in rows if row["stability/skipped_steps"]]
    assert [int(row["step"]) for row in ours] == list(range(8))
    assert [float(row["stability/skipped_steps"]) for row in ours] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [float(row["lr/SGD"]) for row in ours] == pytest.approx([0.05 * WarmupCosine(0.05)(s, 8) for s in range(8)])


def test_tensorboard_logger(tmp_path: Path) -> None:
    fit(suite(), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"grad_norm/total", "grad_norm/net.0", "lr/SGD", "stability/skipped_steps"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("stability/skipped_steps")] == list(range(8))
    assert "gradients/net.0.weight" in tags["histograms"]


def test_several_loggers(tmp_path: Path) -> None:
    memory = MemoryLogger()
    fit(suite(), logger=[CSVLogger(tmp_path), memory, TensorBoardLogger(tmp_path)])
    assert list(memory.values("stability/skipped_steps")) == list(range(8))


# ---- beside training


def test_evaluation_and_prediction_leave_no_trace() -> None:
    callbacks, model = suite(), EvaluatedNet()
    trainer = fit(callbacks, model)
    before = [guard_of(callbacks).state_dict(), copy.deepcopy(model.state_dict())]
    loader = DataLoader([poison(batch) for batch in make_batches(2)], batch_size=None)
    assert len(trainer.validate(model, loader, verbose=False)) == 1
    assert len(trainer.test(model, loader, verbose=False)) == 1
    assert len(trainer.predict(model, loader)) == 2
    assert_same_bits([guard_of(callbacks).state_dict(), model.state_dict()], before)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_evaluation_and_prediction_without_training(what: str) -> None:
    trainer = make_trainer(suite(initialize=True))
    model = EvaluatedNet()
    before = copy.deepcopy(model.state_dict())
    arguments = {} if what == "predict" else {"verbose": False}
    getattr(trainer, what)(model, DataLoader(make_batches(2), batch_size=None), **arguments)
    assert_same_bits(model.state_dict(), before)


def test_evaluation_after_an_exception_in_training() -> None:
    class Fails(EvaluatedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 4:
                raise RuntimeError("not today")
            return super().training_step(batch, batch_idx)

    callbacks, model = suite(), Fails(lambda p: torch.optim.SGD(p, lr=0.05, fused=True))
    trainer = make_trainer(callbacks, log_every_n_steps=100)
    with pytest.raises(RuntimeError, match="not today"):
        trainer.fit(model, loader_of(BATCHES), DataLoader(make_batches(1), batch_size=None))
    trainer.validate(model, DataLoader(make_batches(1), batch_size=None), verbose=False)
    assert guard_of(callbacks).skipped_steps == 1


# ---- beside Lightning's own callbacks


class Tunable(EvaluatedNet):
    """A model that a learning-rate finder and a batch-size finder can tune."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3
        self.batch_size = 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        data = TensorDataset(*(torch.cat(parts) for parts in zip(*make_batches(8), strict=True)))
        return DataLoader(data, self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(make_batches(1), batch_size=None)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_learning_rate_finder(first: bool) -> None:
    rates: list[float] = []

    class Notes(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def train(ours: list[Callback], **arguments: Any) -> tuple[Tunable, pl.Trainer]:
        torch.manual_seed(0)
        finder = LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=20, early_stop_threshold=None)
        callbacks = [finder, *ours, Notes()] if first else [*ours, finder, Notes()]
        model = Tunable()
        trainer = make_trainer(callbacks, **arguments)
        trainer.fit(model)
        return model, trainer

    ours, logger = suite(), MemoryLogger()
    plain, _ = train([])
    plain_rates, rates = rates, []
    model, trainer = train(ours, logger=logger)
    assert model.lr == plain.lr != 1e-3  # what it found is none of our business
    assert set(plain_rates) == {plain.lr}
    # Between steps it shows the base rate; the schedule starts at the first step after the search.
    assert set(rates) == {plain.lr}
    schedule = WarmupCosine(0.05)
    assert list(logger.values("lr/SGD").values()) == [plain.lr * schedule(step, 32) for step in range(32)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr
    assert guard_of(ours).skipped_steps == 0
    assert len(guard_of(ours).state_dict()["recent"]) == 32


@pytest.mark.filterwarnings("ignore:The `batch_arg_name`", "ignore:Checkpoint directory")
def test_batch_size_finder() -> None:
    def train(*callbacks: Callback, **arguments: Any) -> tuple[int, pl.Trainer]:
        finder = BatchSizeFinder(mode="power", init_val=2, max_trials=3, steps_per_trial=1)
        model = Tunable()
        trainer = make_trainer([finder, *callbacks], **arguments)
        trainer.fit(model)
        return model.batch_size, trainer

    ours, logger = suite(), MemoryLogger()
    found, trainer = train(*ours, logger=logger)
    assert found == train()[0] > 2
    assert list(logger.values("stability/skipped_steps")) == list(range(64 // found))
    assert len(guard_of(ours).state_dict()["recent"]) == trainer.global_step == 64 // found


def test_gradient_accumulation_scheduler() -> None:
    callbacks = suite()
    trainer = fit([*callbacks, GradientAccumulationScheduler({0: 1, 1: 4})], max_epochs=3)
    assert trainer.global_step == 8 + 2 + 2
    assert guard_of(callbacks).skipped_steps == 3


def test_early_stopping_and_checkpoints(tmp_path: Path) -> None:
    callbacks = suite()
    stop = EarlyStopping("val_loss", min_delta=100.0, patience=0)
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    trainer = fit([*callbacks, stop, save], max_epochs=5, enable_checkpointing=True)
    assert trainer.current_epoch == 2
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {f"step={n}" for n in (3, 6, 9, 12, 15)}
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0.05
    assert state["callbacks"][guard_of(callbacks).state_key]["skipped_steps"] == 1


@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:Detected call of")
def test_stochastic_weight_averaging() -> None:
    callbacks = suite()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    # It recomputes the statistics of batch normalization from the training data, so there must be no NaN in these.
    fit([*callbacks, average], max_epochs=4, batches=make_batches(8))
    assert len(guard_of(callbacks).state_dict()["recent"]) == 8 * 4


def test_two_monitors() -> None:
    logger = MemoryLogger()
    monitors = [GradientMonitor(per="parameter", weights=False), GradientMonitor(norm_type=2.0, every_n_steps=4)]
    fit([*suite(), *monitors], logger=logger, log_every_n_steps=2)
    assert list(logger.values("grad_norm/net.0.weight")) == [1, 3, 5, 7]
    assert list(logger.values("grad_norm/net.0")) == [1, 3, 5, 7]
    assert len(logger.calls) == len({step for step, metrics in logger.calls if "grad_norm/total" in metrics}) + 1


# ---- copies, and fits one after another

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "monitor": lambda: GradientMonitor(per="parameter"),
    "guard": lambda: StepGuard(max_consecutive_skips=7),
    "clipping": lambda: GradientClipping([ValueClip(0.5), NormClip(0.3)]),
    "schedule": lambda: LRSchedule(WarmupCosine(warmup=3)),
    "initialization": lambda: Initialization(verbose=False),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda callback: pickle.loads(pickle.dumps(callback)),
}


class CopiesInTheMiddle(Callback):
    """Copies all callbacks between the verdict and the update of a step."""

    def __init__(self, how: Callable[[Any], Any]) -> None:
        self.how = how

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self.copies = [self.how(callback) for callback in trainer.callbacks if callback is not self]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_callbacks_behave_like_the_originals(how: str, name: str) -> None:
    def train(callback: Callback) -> tuple[Any, list[Any]]:
        torch.manual_seed(0)
        model, logger = EvaluatedNet(), MemoryLogger()
        others = [] if isinstance(callback, StepGuard) else [StepGuard()]
        trainer = fit([callback, GradientClipping(NormClip(1.0)), *others], model, logger=logger)
        return training_state(model, trainer), logger.calls

    original = CALLBACKS[name]()
    expected = train(CALLBACKS[name]())
    assert_same_bits(train(COPIES[how](original)), expected)  # before a fit
    assert_same_bits(train(original), expected)
    after = COPIES[how](original)
    assert_same_bits(after.state_dict(), original.state_dict())
    assert_same_bits(train(after), expected)  # after one


@pytest.mark.parametrize("how", COPIES)
def test_copies_may_be_taken_in_the_middle_of_a_step(how: str) -> None:
    states, copier = [], CopiesInTheMiddle(COPIES[how])
    for extra in ([], [copier]):
        torch.manual_seed(0)
        model = EvaluatedNet()
        trainer = fit([*(make() for make in CALLBACKS.values()), *extra], model)
        states.append(training_state(model, trainer))
    assert_same_bits(*states)
    assert {type(each) for each in copier.copies} >= {GradientMonitor, StepGuard, LRSchedule}


def test_a_second_fit_with_the_same_trainer_goes_on() -> None:
    """Two fits of one epoch and one of two epochs: the callbacks' counts and schedule are the same."""
    whole, parts = suite(), suite()
    fit(whole, max_epochs=2)
    model, logger = EvaluatedNet(), MemoryLogger()
    trainer = fit(parts, model, logger=logger)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader_of(BATCHES), DataLoader(make_batches(2, seed=1), batch_size=None))
    for one, other in zip(whole, parts, strict=True):
        # The one remembers losses, and the second fit's optimizer begins anew; the other, names of new directories.
        if not isinstance(one, Rollback | FlightRecorder):
            states = [callback.state_dict() for callback in (one, other)]
            for state in states:
                state.pop("rules", None)  # they remember norms
            assert_same_bits(*states)
    assert list(logger.values("stability/skipped_steps")) == list(range(16))


def test_a_second_fit_with_a_new_trainer_starts_anew() -> None:
    callbacks = suite()
    torch.manual_seed(0)
    fit(callbacks, EvaluatedNet())
    stateful = [callback for callback in callbacks if not isinstance(callback, FlightRecorder)]
    states = [copy.deepcopy(callback.state_dict()) for callback in stateful]
    torch.manual_seed(0)
    fit(callbacks, EvaluatedNet())
    assert_same_bits([callback.state_dict() for callback in stateful], states)
