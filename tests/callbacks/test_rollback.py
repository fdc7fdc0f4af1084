"""When training goes back, to what, and how it goes on."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer, RMSprop, lr_scheduler

from stability_callbacks import (
    GradientClipping,
    GradientMonitor,
    LRSchedule,
    Rollback,
    StepGuard,
    TrainingDivergedError,
)
from stability_callbacks.clipping import ZClip
from stability_callbacks.detection import NonFinite, Spike
from stability_callbacks.schedules import WarmupCosine
from tests.models import (
    MODELS,
    BufferNet,
    MemoryLogger,
    NormNet,
    ResumableLoader,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    poison,
    seeded,
    sgd,
    state_after,
    training_state,
)

NAN = float("nan")


class Spoil(Callback):
    """Ruins the state of training when a batch starts, some times."""

    def __init__(self, ruin: Callable[[pl.Trainer, Any], None], *batches: int) -> None:
        self.ruin = ruin
        self.batches = batches

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches:
            with torch.no_grad():
                self.ruin(trainer, pl_module)


def ruin_weight(trainer: pl.Trainer, model: Any) -> None:
    next(parameter for parameter in model.parameters() if parameter.requires_grad).view(-1)[0] = NAN


def ruin_buffer(trainer: pl.Trainer, model: Any) -> None:
    next(buffer for buffer in model.buffers() if buffer.is_floating_point()).view(-1)[0] = NAN


def ruin_momentum(trainer: pl.Trainer, model: Any) -> None:
    tensors = (t for state in trainer.optimizers[0].state.values() for t in state.values() if isinstance(t, Tensor))
    next(t for t in tensors if t.dim()).view(-1)[0] = NAN


def rollback(**arguments: Any) -> Rollback:
    return Rollback(**{"every_n_steps": 4, "patience": 2, "lr_factor": 1.0, **arguments})


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": sgd,
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw_fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01),
}


# ---- what is restored


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["batch_norm", "tied"])
def test_training_goes_on_from_the_snapshot_as_if_nothing_had_been(
    name: str, optimizer: str, storage: str, tmp_path: Path
) -> None:
    good = make_batches(8)
    # The state of step 4 is restored, so batches 4 and 5 are met again to compare.
    met = [*good[:6], make_batches(1, seed=1)[0], *good[4:]]
    callback = rollback(storage=storage, dirpath=tmp_path)
    make = OPTIMIZERS[optimizer]
    callbacks = [StepGuard(), callback, Spoil(ruin_weight, 6)]
    healed = state_after(seeded(MODELS[name], make), met, callbacks, log_every_n_steps=1)
    clean = state_after(seeded(MODELS[name], make), good, [StepGuard()])
    assert callback.rollbacks == 1
    assert_same_bits(healed, clean)


@pytest.mark.parametrize("ruin", [ruin_weight, ruin_buffer, ruin_momentum])
def test_weights_buffers_and_optimizer_state_that_are_not_finite_are_found_and_healed(ruin: Any) -> None:
    callback, model = rollback(), seeded(NormNet)
    trainer = fit(model, make_batches(16), [Spoil(ruin, 6), StepGuard(), callback])
    assert callback.rollbacks == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    state = trainer.optimizers[0].state_dict()["state"]
    assert all(torch.isfinite(value).all() for each in state.values() for value in each.values())


def test_a_state_ruined_before_the_first_snapshot_goes_back_to_the_start() -> None:
    start = {name: value.clone() for name, value in seeded(NormNet).state_dict().items()}
    model = seeded(NormNet)

    class LookAtEnd(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                assert_same_bits(dict(pl_module.state_dict()), start)
                assert not trainer.optimizers[0].state

    fit(model, make_batches(3), [StepGuard(), rollback(), Spoil(ruin_weight, 1), LookAtEnd()])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_without_a_guard_a_ruined_state_is_found_when_a_snapshot_is_due() -> None:
    batches = make_batches(9)
    batches[5] = poison(batches[5])
    model, callback = seeded(NormNet), rollback()
    fit(model, batches, [callback])
    assert callback.rollbacks == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_an_average_of_the_weights_is_restored_too() -> None:
    model, callback = seeded(NormNet), rollback()
    average = EMAWeightAveraging(decay=0.9)
    fit(model, make_batches(12), [average, StepGuard(), callback, Spoil(ruin_weight, 6)])
    assert callback.rollbacks == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())  # the average, at the end


@pytest.mark.parametrize("average_first", [True, False])
def test_an_average_is_the_one_of_a_run_that_never_failed(average_first: bool) -> None:
    good = make_batches(8)
    met = [*good[:6], make_batches(1, seed=1)[0], *good[4:]]

    def train(batches: Any, *callbacks: Any) -> dict[str, Any]:
        model, average = seeded(NormNet), EMAWeightAveraging(decay=0.9)
        fit(model, batches, [average, *callbacks] if average_first else [*callbacks, average])
        return dict(model.state_dict())

    assert_same_bits(train(met, StepGuard(), rollback(), Spoil(ruin_weight, 6)), train(good, StepGuard()))


def test_statistics_of_clip_rules_and_detectors_go_back_too() -> None:
    good = make_batches(8)
    met = [*good[:6], make_batches(1, seed=1)[0], *good[4:]]

    def callbacks() -> list[Any]:
        return [
            GradientClipping(ZClip(warmup_steps=2, max_norm=None)),
            StepGuard([NonFinite(), Spike(window=8, min_history=2, threshold=1e3)]),
        ]

    healed, clean = callbacks(), callbacks()
    fit(seeded(NormNet), met, [*healed, rollback(), Spoil(ruin_weight, 6)])
    fit(seeded(NormNet), good, clean)
    assert_same_bits(healed[0].state_dict()["rules"], clean[0].state_dict()["rules"])
    assert_same_bits(healed[1].state_dict()["detectors"], clean[1].state_dict()["detectors"])


def test_the_loss_scaler_goes_back_too() -> None:
    scales = []

    class Scale(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            scales.append(trainer.precision_plugin.scaler.get_scale())

    callback = rollback()
    callbacks = [StepGuard(), callback, Spoil(ruin_weight, 6), Scale()]
    fit(seeded(NormNet), make_batches(9), callbacks, plugins=[fp16(1024.0)])
    assert callback.rollbacks == 1
    assert scales == [1024.0] * 9  # the scaler had halved it for the step that was not finite


@pytest.mark.parametrize("accumulate", [2])
def test_accumulation_counts_optimizer_steps(accumulate: int) -> None:
    good = make_batches(16)
    met = [*good[:12], *make_batches(2, seed=1), *good[8:]]
    callbacks = [StepGuard(), callback := rollback(), Spoil(ruin_weight, 12)]
    healed = state_after(seeded(NormNet), met, callbacks, accumulate_grad_batches=accumulate)
    clean = state_after(seeded(NormNet), good, [StepGuard()], accumulate_grad_batches=accumulate)
    assert callback.rollbacks == 1
    assert_same_bits(healed, clean)


def test_manual_optimization_with_two_optimizers() -> None:
    good = make_batches(8)
    met = [*good[:6], make_batches(1, seed=1)[0], *good[4:]]
    healed = state_after(seeded(TwoOptimizers), met, [StepGuard(), callback := rollback(), Spoil(ruin_weight, 6)])
    clean = state_after(seeded(TwoOptimizers), good, [StepGuard()])
    assert callback.rollbacks == 1
    assert_same_bits(healed, clean)


# ---- what calls for it


def test_too_many_skips_in_a_row_call_for_it_and_fewer_do_not() -> None:
    batches = make_batches(12)
    for index in (4, 6, 7, 9):
        batches[index] = poison(batches[index])
    once, never = rollback(patience=2), rollback(patience=3)
    fit(seeded(NormNet), batches, [StepGuard(), once])
    fit(seeded(NormNet), batches, [StepGuard(), never])
    assert (once.rollbacks, never.rollbacks) == (1, 0)


class Drifting(pl.LightningModule):
    """A loss that is the distance of one weight from zero, with a little noise; gradients stay small throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.abs() + 0.01 * batch.mean()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_a_loss_that_has_risen_and_stays_up_calls_for_it(log_every_n_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, generator=generator) for _ in range(100)]

    def displace(trainer: Any, model: Any) -> None:
        model.weight.add_(100.0)

    model, callback = Drifting(), rollback(every_n_steps=10, patience=5)
    callbacks = [StepGuard(), callback, Spoil(displace, 85)]
    fit(model, batches, callbacks, log_every_n_steps=log_every_n_steps)
    assert callback.rollbacks == 1
    assert 0.9 < float(model.weight.detach()) < 1.1


def test_no_snapshot_is_taken_while_the_loss_is_rising(caplog: pytest.LogCaptureFixture) -> None:
    batches = [torch.zeros(4) for _ in range(100)]

    def displace(trainer: Any, model: Any) -> None:
        model.weight.add_(100.0)

    model, callback = Drifting(), rollback(every_n_steps=1, patience=5)
    with caplog.at_level(logging.WARNING):
        fit(model, batches, [StepGuard(), callback, Spoil(displace, 85)])
    assert "restored the state of step 85," in caplog.text
    assert callback.rollbacks == 1


def test_one_high_loss_does_not() -> None:
    batches = [torch.zeros(4) for _ in range(100)]
    batches[80] = torch.full((4,), 1e4)
    fit(Drifting(), batches, [StepGuard(), callback := rollback(every_n_steps=10)])
    assert callback.rollbacks == 0


def test_a_loss_scaler_that_searches_its_scale_does_not() -> None:
    callback, guard = rollback(), StepGuard()
    fit(seeded(NormNet), make_batches(40), [guard, callback], plugins=[fp16(2.0**40)])
    assert guard.skipped_steps > callback.patience
    assert callback.rollbacks == 0


def test_masks_of_infinities_do_not() -> None:
    fit(seeded(BufferNet), make_batches(12), [StepGuard(), callback := rollback()])
    assert callback.rollbacks == 0


def test_no_snapshot_is_taken_soon_after_a_bad_step() -> None:
    batches = make_batches(9)
    batches[3] = poison(batches[3])
    taken: list[int] = []

    class Steps(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            taken.append(callback._ring.steps[-1])

    callback = rollback(every_n_steps=4, patience=3)
    fit(seeded(NormNet), batches, [StepGuard(), callback, Steps()])
    # Due at 4, where the step before was bad: taken three good steps later, and then at its time again.
    assert taken == [0, 0, 0, 0, 0, 0, 7, 8, 8]


# ---- the clock


class Scheduled(NormNet):
    """The rates that its optimizer's arithmetic sees are kept."""

    def __init__(self, scheduler: Any = None) -> None:
        super().__init__()
        self.make_scheduler = scheduler
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        model = self

        class Noting(SGD):
            def _init_group(self, group: Any, *args: Any) -> Any:  # called inside `step`, after all hooks
                model.rates.append(float(group["lr"]))
                return super()._init_group(group, *args)

        optimizer = Noting(self.parameters(), lr=0.1, momentum=0.9)
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


SCHEDULERS: dict[str, Any] = {
    "none": (None, []),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=24), []),
    "one_cycle": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=24), []),
    "ours": (None, [LRSchedule(WarmupCosine(warmup=5, total_steps=24))]),
    "ours and cosine": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=24),
        [LRSchedule(WarmupCosine(warmup=5, total_steps=24))],
    ),
}


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_learning_rate_after_a_rollback_is_right_to_the_last_step(name: str, storage: str, tmp_path: Path) -> None:
    scheduler, callbacks = SCHEDULERS[name]
    plain, healed = seeded(Scheduled, scheduler), seeded(Scheduled, scheduler)
    fit(plain, make_batches(24), [StepGuard(), *callbacks])
    recovering = rollback(lr_factor=0.5, lr_recovery_steps=8, storage=storage, dirpath=tmp_path)
    trainer = fit(healed, make_batches(24), [StepGuard(), *callbacks, recovering, Spoil(ruin_weight, 6)])
    assert recovering.rollbacks == 1
    # The arithmetic of the skipped step 6 does not run, so it notes no rate.
    scale = [1.0] * 6 + [0.5 + 0.5 * step / 8 for step in range(8)] + [1.0] * 9
    del plain.rates[6]
    assert healed.rates == pytest.approx([rate * s for rate, s in zip(plain.rates, scale, strict=True)], rel=1e-12)
    momentum = trainer.optimizers[0].param_groups[0]["momentum"]
    assert (momentum != 0.9) == (name == "one_cycle")  # it is the scheduler's, and not rewound


def test_a_second_rollback_multiplies_the_rate_in_force() -> None:
    logger, callback = MemoryLogger(), rollback(lr_factor=0.5, lr_recovery_steps=8, max_rollbacks=5)
    callbacks = [StepGuard(), callback, Spoil(ruin_weight, 6, 10)]
    model = seeded(Scheduled)
    fit(model, make_batches(14), callbacks, logger=logger)
    assert callback.rollbacks == 2
    first = [0.5, 0.5625, 0.625, 0.6875]  # after batch 6
    second = [(first[3] + 0.0625) / 2 * 1.0]  # the factor in force when batch 10 was lost was that of four steps
    # The arithmetic of the skipped steps 6 and 10 does not run.
    assert model.rates[6:9] == pytest.approx([0.1 * s for s in first[:3]])
    assert model.rates[9] == pytest.approx(0.1 * second[0])
    assert logger.values("stability/rollbacks")[13] == 2
    assert list(logger.values("stability/lr_scale").values())[-1] < 1


# ---- relapses, and giving up


def test_a_relapse_goes_one_snapshot_further_back(caplog: pytest.LogCaptureFixture) -> None:
    callback = rollback(keep=3, max_rollbacks=5)
    with caplog.at_level(logging.WARNING):
        fit(seeded(NormNet), make_batches(16), [StepGuard(), callback, Spoil(ruin_weight, 9, 10, 11, 12)])
    messages = [record.getMessage() for record in caplog.records if "Rollback" in record.getMessage()]
    restored = [int(message.split("state of step ")[1].split(",")[0]) for message in messages]
    assert restored == [8, 4, 0, 0]


def test_progress_ends_the_row() -> None:
    callback = rollback(max_rollbacks=1, lr_recovery_steps=4)
    fit(seeded(NormNet), make_batches(20), [StepGuard(), callback, Spoil(ruin_weight, 5, 14)])
    assert callback.rollbacks == 2


@pytest.mark.parametrize("max_rollbacks", [0, 2])
def test_giving_up_leaves_the_last_good_state_behind(max_rollbacks: int, tmp_path: Path) -> None:
    model, callback = seeded(NormNet), rollback(max_rollbacks=max_rollbacks, dirpath=tmp_path)
    with pytest.raises(TrainingDivergedError, match=r"last-good-step=\d\.ckpt") as error:
        fit(model, make_batches(20), [StepGuard(), callback, Spoil(ruin_weight, *range(6, 20))])
    assert callback.rollbacks == max_rollbacks
    path = tmp_path / f"last-good-step={0 if max_rollbacks else 4}.ckpt"  # each relapse goes further back
    assert str(path) in str(error.value)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert_same_bits(dict(model.state_dict()), saved)
    assert all(torch.isfinite(value).all() for value in saved.values())
    resumed = NormNet()
    fit(resumed, make_batches(20), [StepGuard(), rollback()], ckpt_path=path, max_epochs=2)


def test_bad_data_alone_ends_in_the_same_error(tmp_path: Path) -> None:
    batches = [*make_batches(5), *map(poison, make_batches(40))]
    callback = rollback(dirpath=tmp_path)
    with pytest.raises(TrainingDivergedError, match="2 steps in a row were skipped, after 3 rollbacks"):
        fit(seeded(NormNet), batches, [StepGuard(), callback])


# ---- where snapshots are kept


def test_checkpoints_of_the_ring_are_whole_and_can_be_resumed(tmp_path: Path) -> None:
    batches = make_batches(12)
    fit(seeded(NormNet), ResumableLoader(batches[:9]), [StepGuard(), rollback(storage="disk", dirpath=tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshot-step=4.ckpt", "snapshot-step=8.ckpt"]
    resumed = NormNet()
    path = tmp_path / "snapshot-step=8.ckpt"
    trainer = fit(resumed, ResumableLoader(batches), [StepGuard(), rollback()], ckpt_path=path)
    plain = seeded(NormNet)
    expected = fit(plain, ResumableLoader(batches), [StepGuard()])
    assert_same_bits(training_state(resumed, trainer), training_state(plain, expected))


def test_a_damaged_snapshot_is_said_and_the_older_one_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damage(trainer: Any, model: Any) -> None:
        ruin_weight(trainer, model)
        path = tmp_path / "snapshot-step=8.ckpt"
        path.write_bytes(path.read_bytes()[:1000])

    callback = rollback(storage="disk", dirpath=tmp_path)
    with caplog.at_level(logging.WARNING):
        fit(seeded(NormNet), make_batches(14), [StepGuard(), callback, Spoil(damage, 9)])
    assert callback.rollbacks == 1
    assert "snapshot-step=8.ckpt can't be read" in caplog.text
    assert "restored the state of step 4" in caplog.text


def test_non_persistent_buffers_are_in_snapshots_on_disk_too(tmp_path: Path) -> None:
    class Counting(NormNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def loss(self, batch: Any) -> Tensor:
            self.seen += 1
            return super().loss(batch)

    model = seeded(Counting)
    callback = rollback(storage="disk", dirpath=tmp_path)
    fit(model, make_batches(9), [StepGuard(), callback, Spoil(ruin_weight, 6)])
    assert callback.rollbacks == 1
    assert float(model.seen) == 4 + 2  # four at the snapshot, two after the rollback


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    class Kept(Callback):
        def on_train_end(self, *_: Any) -> None:
            kept.append(type(callback._ring).__name__)
            counts.append(len(callback._ring.steps))

    kept: list[str] = []
    counts: list[int] = []
    for max_memory, match in ((10**9, None), (1_500, "keeps [12] of 3"), (100, "writes its snapshots to")):
        callback = rollback(keep=3, max_memory=max_memory, dirpath=tmp_path)
        arguments = (seeded(NormNet), make_batches(14), [StepGuard(), Kept(), callback])
        if match is None:
            fit(*arguments)
        else:
            with pytest.warns(UserWarning, match=match):
                fit(*arguments)
    assert kept == ["SnapshotRing", "SnapshotRing", "CheckpointRing"]
    assert counts[0] == counts[2] == 3
    assert counts[1] < 3


# ---- the gate


def checkpoints(directory: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, **arguments)


@pytest.mark.parametrize("ruin", [ruin_weight, ruin_buffer, ruin_momentum])
def test_no_ruined_state_takes_the_place_of_a_good_checkpoint(ruin: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints(tmp_path, save_last=True)
    model = seeded(NormNet)
    with pytest.warns(UserWarning, match="not finite"):
        fit(model, make_batches(6), [Spoil(ruin, 4), StepGuard(), checkpoint], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    assert Path(checkpoint.best_model_path).name == "step=4.ckpt"
    for name in ("last", "step=4"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] == 4
        assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_the_gate_goes_when_training_ends(tmp_path: Path) -> None:
    checkpoint = checkpoints(tmp_path)
    fit(seeded(NormNet), make_batches(3), [StepGuard(), checkpoint], enable_checkpointing=True)
    assert not any(callable(value) for name, value in vars(checkpoint).items() if name not in ("log", "log_dict"))
    pickle.loads(pickle.dumps(checkpoint))


def test_masks_of_infinities_are_saved(tmp_path: Path) -> None:
    fit(seeded(BufferNet), make_batches(3), [StepGuard(), checkpoints(tmp_path)], enable_checkpointing=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]


# ---- the rest


@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rollback_that_never_fires_is_invisible(name: str, optimizer: str) -> None:
    if name == "sparse" and optimizer == "adamw_fused":
        pytest.skip("AdamW takes no sparse gradients")
    batches = make_batches(10)
    with_it = state_after(seeded(MODELS[name], OPTIMIZERS[optimizer]), batches, [rollback(), GradientMonitor()])
    assert_same_bits(with_it, state_after(seeded(MODELS[name], OPTIMIZERS[optimizer]), batches))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("interrupted_after", [3, 5, 7, 9])
def test_resume_is_exact_while_the_rate_recovers(interrupted_after: int, tmp_path: Path) -> None:
    batches = make_batches(14)

    def callbacks(*more: Any) -> list[Any]:
        return [StepGuard(), rollback(lr_factor=0.5, lr_recovery_steps=6), Spoil(ruin_weight, 4), *more]

    whole = seeded(NormNet)
    expected = fit(whole, ResumableLoader(batches), callbacks())
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=interrupted_after, save_top_k=-1)
    first = seeded(NormNet)
    fit(first, ResumableLoader(batches), callbacks(saved), enable_checkpointing=True, max_steps=interrupted_after)
    resumed = NormNet()
    again = ModelCheckpoint(tmp_path, every_n_train_steps=interrupted_after, save_top_k=-1)
    path = saved.best_model_path
    trainer = fit(resumed, ResumableLoader(batches), callbacks(again), ckpt_path=path, enable_checkpointing=True)
    assert_same_bits(training_state(resumed, trainer), training_state(whole, expected))


def test_weights_that_are_nan_from_the_start_are_refused() -> None:
    model = seeded(NormNet)
    with torch.no_grad():
        model.net[3].weight[0] = NAN
    with pytest.raises(MisconfigurationException, match=r"nothing good to go back to: net\.3\.weight"):
        fit(model, make_batches(3), [StepGuard(), rollback()])


def test_buffers_that_wait_for_their_first_value_as_nan_are_not() -> None:
    model = seeded(NormNet)
    model.register_buffer("not_yet", torch.full((2,), NAN))
    fit(model, make_batches(9), [StepGuard(), callback := rollback()])
    assert callback.rollbacks == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps"),
        ({"keep": 0}, ValueError, "keep"),
        ({"patience": 0}, ValueError, "patience"),
        ({"lr_factor": 0.0}, ValueError, "lr_factor"),
        ({"lr_factor": 1.5}, ValueError, "lr_factor"),
        ({"lr_recovery_steps": -1}, ValueError, "lr_recovery_steps"),
        ({"max_rollbacks": -1}, ValueError, "max_rollbacks"),
        ({"storage": "cloud"}, ValueError, "storage"),
        ({"max_memory": -1}, ValueError, "max_memory"),
        ({"keep": "2"}, TypeError, "keep"),
        ({"dirpath": 3}, TypeError, "dirpath"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"`{message}`"):
        Rollback(**arguments)
