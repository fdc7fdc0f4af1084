"""The loss of a training step that leaves training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from stability_callbacks.engine import detached_from_trainer, loss_of
from tests.models import TwoOptimizers

BATCH = torch.tensor([1.0, 3.0])


class Base(pl.LightningModule):
    """One weight that multiplies the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def loss(self, batch: Tensor) -> Tensor:
        return (self.weight * batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class GivesTensor(Base):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch) + batch_idx


class TakesOnlyTheBatch(Base):
    def training_step(self, batch: Tensor) -> Any:
        return self.loss(batch) + 7


class NamesTheIndexOtherwise(Base):
    def training_step(self, batch: Tensor, i: int) -> Any:
        return self.loss(batch) + i


class GivesDict(Base):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": self.loss(batch) + batch_idx, "more": 1}


class NotLightning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).mean() + batch_idx


@pytest.mark.parametrize(
    "model", [GivesTensor, TakesOnlyTheBatch, NamesTheIndexOtherwise, GivesDict, NotLightning], ids=lambda m: m.__name__
)
def test_the_loss_is_what_lightning_would_send_backward(model: type[nn.Module]) -> None:
    module = model()
    loss = loss_of(module, BATCH, 7)
    assert loss is not None
    assert float(loss.detach()) == 2.0 * 2.0 + 7
    loss.backward()
    assert float(next(module.parameters()).grad) == 2.0


@pytest.mark.parametrize("output", [None, {}, {"prediction": 1}], ids=repr)
def test_a_step_may_give_no_loss(output: Any) -> None:
    class Silent(Base):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return output

    assert loss_of(Silent(), BATCH, 0) is None


def test_a_step_that_gives_something_else_is_refused() -> None:
    class Wrong(Base):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": 1.5}

    with pytest.raises(TypeError, match=r"Wrong.training_step must give a tensor, .* got float"):
        loss_of(Wrong(), BATCH, 0)


def test_a_step_that_takes_an_iterator_is_refused() -> None:
    class Iterates(Base):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(TypeError, match="from an iterator"):
        loss_of(Iterates(), BATCH, 0)


def test_a_module_without_a_training_step_is_refused() -> None:
    with pytest.raises(TypeError, match="got a Linear, which has none"):
        loss_of(nn.Linear(1, 1), BATCH, 0)


class UsesEverything(Base):
    """Manual optimization that calls all that a step may call."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Parameter(torch.tensor(1.0))
        self.seen: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        schedule, plateau = self.lr_schedulers()
        self.seen += [type(self.logger).__name__, first.param_groups[0]["lr"], schedule.get_last_lr(), schedule, first]
        with first.toggle_model():
            pass
        with self.toggled_optimizer(first):
            first.param_groups[0]["lr"] = 123.0
            first.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(first, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            first.step()
        self.toggle_optimizer(second)
        second.step(closure=lambda: self.manual_backward(self.other * 10))
        second.optimizer.step()
        self.untoggle_optimizer(second)
        schedule.step()
        plateau.step(1.0)
        self.log("train_loss", 1.0, on_step=True, prog_bar=True)
        self.log_dict({"a": 1.0})
        self.print("not to be seen")

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD([self.weight], lr=0.5, momentum=0.9)
        second = torch.optim.Adam([self.other], lr=0.25)
        return [first, second], [StepLR(first, 1), ReduceLROnPlateau(second)]


def test_without_a_trainer_manual_optimization_sums_what_it_sends_backward(capsys: pytest.CaptureFixture[str]) -> None:
    model = UsesEverything()
    before = dict(vars(model))
    loss = loss_of(model, BATCH, 0)
    assert loss is not None
    assert float(loss.detach()) == 2.0 * 2.0 + 10.0
    assert capsys.readouterr().out == ""
    assert vars(model) == before
    assert [parameter.item() for parameter in model.parameters()] == [2.0, 1.0]
    assert model.seen[:3] == ["NoneType", 0.5, [0.5]]
    assert isinstance(model.seen[3], StepLR)
    assert isinstance(model.seen[4], Optimizer)


def test_manual_optimization_that_sends_nothing_backward_has_no_loss() -> None:
    model = UsesEverything()
    model.training_step = lambda batch, batch_idx: None
    assert loss_of(model, BATCH, 0) is None


def test_methods_come_back_after_an_exception() -> None:
    class Raises(Base):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise KeyError("x")

    model = Raises()
    model.log = "my own"
    with pytest.raises(KeyError):
        loss_of(model, BATCH, 0)
    assert model.log == "my own"
    assert "log_dict" not in vars(model)


def test_lightning_modules_inside_are_detached_too_and_contexts_nest() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = UsesEverything()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.inner.log("x", 1.0)
            self.inner.manual_backward(batch.sum())
            return batch.mean()

    outer = Outer()
    with detached_from_trainer(outer) as sent_backward:
        assert float(loss_of(outer, BATCH, 0)) == 2.0
        assert not sent_backward  # the innermost context takes them
        outer.inner.manual_backward(BATCH[1])
    assert [float(loss) for loss in sent_backward] == [3.0]
    assert "manual_backward" not in vars(outer.inner)


class AsksAgain(pl.Callback):
    """Runs each batch once more, at each place where a callback may."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._ask(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._ask(trainer, pl_module)

    def _ask(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        attributes, loggers = dict(vars(pl_module)), trainer.loggers
        loss = loss_of(pl_module, BATCH, 0)
        assert loss is not None
        assert loss.requires_grad
        assert vars(pl_module) == attributes
        assert trainer.loggers is loggers


class Logs(Base):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.logger.log_metrics({"direct": 1.0}, step=self.global_step)
        self.log("train_loss", self.loss(batch[0]), on_step=True)
        return self.loss(batch[0])


class TwoThatLog(UsesEverything):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch[0] if isinstance(batch, list) else batch, batch_idx)


@pytest.mark.parametrize("model", [Logs, TwoThatLog], ids=lambda m: m.__name__)
def test_a_run_in_which_each_step_is_asked_again_is_the_same_run(
    model: type[Base], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name, callbacks in (("plain", []), ("asked", [AsksAgain()])):
        module = model()
        logger = CSVLogger(tmp_path, name=name, version=0)
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=callbacks,
            logger=logger,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(8.0)), batch_size=2)
        trainer.fit(module, loader)
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        metrics = (tmp_path / name / "version_0" / "metrics.csv").read_text()
        printed = capsys.readouterr().out
        runs.append((module.state_dict(), trainer.global_step, optimizers, schedulers, metrics, printed))
    assert runs[0] == runs[1]
    assert "train_loss" in runs[0][4]


def test_two_optimizers_of_a_live_trainer_stay_as_they_are(tmp_path: Path) -> None:
    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for parameter in pl_module.parameters():
                parameter.grad = torch.ones_like(parameter)
            loss = loss_of(pl_module, batch, batch_idx)
            assert loss is not None
            for parameter in pl_module.parameters():
                assert torch.equal(parameter.grad, torch.ones_like(parameter))
            assert trainer.global_step == 0

    trainer = pl.Trainer(fast_dev_run=True, callbacks=[Ask()], enable_progress_bar=False, enable_model_summary=False)
    data = torch.utils.data.TensorDataset(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    trainer.fit(TwoOptimizers(), torch.utils.data.DataLoader(data, batch_size=4))
