"""What a skipped window leaves behind: nothing, whatever its forward passes wrote, and however they ended."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from stability_callbacks import FlightRecorder, StepGuard
from stability_callbacks.detection import InputRange, NonFinite
from stability_callbacks.diagnosis import read_incidents
from stability_callbacks.engine._metric_backup import MetricBackup
from stability_callbacks.engine._moving_parameters import MovingParameters
from tests.models import (
    NormNet,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    loader_of,
    make_batches,
    make_trainer,
    poison,
    seeded,
    state_after,
    training_state,
)

# ---- steps without gradients


class ReturnsNoneOnNaN(NormNet):
    """The usual workaround."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if torch.isfinite(loss) else None


class ZeroesGradientsOnNaN(NormNet):
    """Another one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.bad = not torch.isfinite(loss := super().training_step(batch, batch_idx))
        return loss

    def on_after_backward(self) -> None:
        if self.bad:
            self.zero_grad()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [ReturnsNoneOnNaN, ZeroesGradientsOnNaN])
def test_a_bad_batch_whose_gradients_the_user_dropped_leaves_no_trace(
    make: Any, accumulate: int, tmp_path: Any
) -> None:
    batches = make_batches(8)
    bad = [poison(batches[0])] * accumulate
    guard = StepGuard()
    callbacks = [guard, FlightRecorder(tmp_path)]
    healed = state_after(
        seeded(make), [*batches[:4], *bad, *batches[4:]], callbacks, accumulate_grad_batches=accumulate
    )
    assert_same_bits(healed, state_after(seeded(make), batches, accumulate_grad_batches=accumulate))
    assert read_incidents(tmp_path / "incidents.jsonl")[0].kind == "nonfinite"


class RenewsStatistics(pl.LightningModule):
    """A batch norm whose statistics the last epoch of SWA renews."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.norm(3 * batch[0] + 5)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("places", [(), (3,), (0, 7), (8,)])
def test_statistics_that_are_renewed_without_gradients_leave_bad_batches_out(places: tuple[int, ...]) -> None:
    batches = make_batches(9)
    train = [poison(batch) if place in places else batch for place, batch in enumerate(batches)]
    model, swa = seeded(RenewsStatistics), StochasticWeightAveraging(1e-3, swa_epoch_start=2)
    make_trainer([StepGuard(), swa], max_epochs=4).fit(model, loader_of(train))
    good = [3 * x + 5 for place, (x, _) in enumerate(batches) if place not in places]
    assert model.norm.num_batches_tracked == len(good)
    torch.testing.assert_close(model.norm.running_mean, torch.stack([x.mean(0) for x in good]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([x.var(0) for x in good]).mean(0))


# ---- manual optimization


class AccumulatesByHand(pl.LightningModule):
    """Steps after every third batch; sends losses backward by torch's own method."""

    def __init__(self, set_to_none: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.set_to_none = set_to_none
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (nn.functional.cross_entropy(self.net(batch[0]), batch[1]) / 3).backward()
        if batch_idx % 3 == 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.set_to_none)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_windows_of_losses_that_lightning_does_not_see_are_dropped_as_a_whole(position: int, set_to_none: bool) -> None:
    batches, window = make_batches(9), make_batches(3, seed=1)
    window[position] = poison(window[position])
    guard = StepGuard()
    healed = state_after(seeded(AccumulatesByHand, set_to_none), [*batches[:3], *window, *batches[3:]], [guard])
    assert guard.skipped_steps == 1
    assert_same_bits(healed, state_after(seeded(AccumulatesByHand, set_to_none), batches))


# ---- what others write inside of a window


class CountsValidations(NormNet):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("validations", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best", torch.full((2,), float("inf")))
        self.register_buffer("between", torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.validations += 1
        self.best = torch.full((3,), float(self.validations))  # another tensor, of another shape

    def on_train_batch_end(self, *args: Any) -> None:
        self.between += 1


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_validation_inside_of_a_skipped_window_is_not_undone(every: int, manual: bool) -> None:
    class ByHand(CountsValidations):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch) / 4)
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

    batches = make_batches(12)
    batches[5] = poison(batches[5])
    make = ByHand if manual else CountsValidations
    guard, model = StepGuard(), seeded(make)
    accumulate = 1 if manual else 4
    trainer = make_trainer(
        [guard], accumulate_grad_batches=accumulate, val_check_interval=every, num_sanity_val_steps=0
    )
    trainer.fit(model, loader_of(batches), loader_of(make_batches(1)))
    assert guard.skipped_steps == 1
    assert model.validations == len(batches) // every
    assert model.best.tolist() == [len(batches) // every] * 3
    assert model.between == len(batches)
    assert model.net[1].num_batches_tracked == 8


# ---- what training logs


class Logs(NormNet):
    """Logs its loss in every way, and keeps metrics."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(*([] if optimizer is None else [optimizer]))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.metrics = torchmetrics.MetricCollection(
            {"f1": torchmetrics.F1Score("multiclass", num_classes=3), "auroc": torchmetrics.MeanMetric("disable")}
        )
        self.seen = torchmetrics.CatMetric("disable")
        self.epochs: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        scores = self.net(batch[0]).detach()
        self.accuracy(scores, batch[1])
        self.metrics["f1"].update(scores, batch[1])
        self.metrics["auroc"].update(loss.detach())
        self.seen.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("worst", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("sum", loss, reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        for name, metric in self.metrics.items():
            self.log(name, metric.compute())
        self.log("seen", self.seen.compute().sum())
        self.metrics.reset()
        self.seen.reset()


class Epochs(pl.Callback):
    """Keeps what each epoch came to."""

    def __init__(self) -> None:
        self.results: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.keep(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
        self.results.append({name: value for name, value in metrics.items() if name not in ("loss", "loss_step")})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_batch_counts_in_no_metric(place: int, fused: bool, accumulate: int) -> None:
    def train(batches: Any, *callbacks: Any) -> tuple[Any, Any]:
        model = seeded(Logs, lambda p: torch.optim.SGD(p, lr=0.1, fused=fused))
        epochs = Epochs()
        callbacks = (*callbacks, epochs)
        trainer = fit(model, batches, callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
        return training_state(model, trainer), epochs.results

    batches = make_batches(6)
    bad = [poison(batches[0])] * accumulate
    place = place // accumulate * accumulate
    healed, metrics = train([*batches[:place], *bad, *batches[place:]], StepGuard())
    plain, expected = train(batches)
    assert_same_bits(metrics, expected)
    assert_same_bits(healed, plain)


@pytest.mark.parametrize("monitor", ["loss_epoch", "accuracy"])
def test_callbacks_that_watch_a_metric_see_the_good_batches(monitor: str, tmp_path: Any) -> None:
    batches = make_batches(8)
    batches[3] = poison(batches[3])
    stop = EarlyStopping(monitor, patience=10, check_finite=True)
    best = ModelCheckpoint(tmp_path, monitor=monitor)
    trainer = make_trainer([StepGuard(), stop, best], max_epochs=3, enable_checkpointing=True)
    trainer.fit(seeded(Logs), loader_of(batches))
    assert trainer.current_epoch == 3
    assert best.best_model_score is not None
    assert torch.isfinite(best.best_model_score)


def test_a_backup_of_metrics_can_be_put_back_twice() -> None:
    model = nn.Module()
    model.collection = torchmetrics.MetricCollection(
        [torchmetrics.Precision("multiclass", num_classes=3), torchmetrics.Recall("multiclass", num_classes=3)]
    )
    scores, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    model.collection.update(scores, labels)
    expected = {name: value.clone() for name, value in model.collection.compute().items()}
    backup = MetricBackup(model, list)
    backup.take()
    for _ in range(2):
        model.collection.update(-scores, labels)
        backup.restore()
        assert_same_bits(dict(model.collection.compute()), expected)
    model.collection.update(-scores, labels)
    assert backup.restorable_where()
    backup.restore_where(torch.tensor(False))
    assert not torch.equal(model.collection.compute()["MulticlassRecall"], expected["MulticlassRecall"])
    backup.restore_where(torch.tensor(True))
    assert_same_bits(dict(model.collection.compute()), expected)


def test_gradients_that_a_loss_scaler_left_behind_are_no_window(tmp_path: Any) -> None:
    """A scaler that finds infinity does not call ``step()``, so nobody drops the gradients of the skipped step."""
    batches = make_batches(6)
    batches[2] = poison(batches[2])
    guard = StepGuard([InputRange(), NonFinite()])
    fit(seeded(TwoOptimizers), batches, [guard], plugins=[fp16()])
    assert guard.skipped_steps == 2  # both optimizers' steps on the poisoned batch, and none on the next


# ---- parameters that no optimizer trains


class Teaches(NormNet):
    """Moves a teacher in its training step, as momentum contrast and mean teachers do."""

    how = "lerp"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                if self.how == "lerp":
                    slow.lerp_(fast, 0.1)
                elif self.how == "data":
                    slow.data.mul_(0.9).add_(0.1 * fast.detach().data)
                else:
                    slow.data = 0.9 * slow.data + 0.1 * fast.data
        target = self.teacher(torch.nan_to_num(batch[0])).detach()
        return super().loss(batch) + (self.net(batch[0]) - target).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, fused=self.fused)

    fused = False


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["lerp", "data", "assign"])
@pytest.mark.parametrize("place", [0, 2, 8])
def test_a_skipped_batch_does_not_move_a_teacher(place: int, how: str, accumulate: int, fused: bool) -> None:
    def train(batches: Any, *callbacks: Any) -> Any:
        model = seeded(Teaches)
        model.how, model.fused = how, fused
        return state_after(model, batches, callbacks, accumulate_grad_batches=accumulate)["model"]

    batches = make_batches(12)
    bad = [poison(batches[0])] * accumulate
    guard = StepGuard()
    assert_same_bits(train([*batches[:place], *bad, *batches[place:]], guard), train(batches))
    assert guard.skipped_steps == 1


def test_a_frozen_backbone_is_not_copied_in_each_step() -> None:
    head, backbone = nn.Linear(2, 2), nn.Linear(100, 100).requires_grad_(False)
    small = nn.Linear(2, 2).requires_grad_(False)
    trained = {id(each) for each in head.parameters()}
    assert not MovingParameters(nn.ModuleList([head, backbone]), lambda: trained)._watched
    still = MovingParameters(nn.ModuleList([head, small]), lambda: trained)
    for _ in range(13):
        still.take()
    assert not still._watched
    still.refresh()  # in the next epoch it is looked at again
    assert len(still._watched) == 2
