"""The callback: on a fresh run only, with weights from the seed alone, and no trace in the random state of training."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from stability_callbacks.callbacks.initialization import Initialization
from stability_callbacks.initialization import LSUV, Auto, ByPattern, InitReport, Normal, Xavier, signal_report
from tests.models import (
    MemoryLogger,
    NormNet,
    ResumableLoader,
    SparseNet,
    TiedNet,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    training_state,
)


class StartingWeights(pl.Callback):
    """Notes the weights with which training starts, and where the random states are then."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.randomness: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self.randomness = [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002


def start(model: pl.LightningModule, *callbacks: pl.Callback, **arguments: Any) -> StartingWeights:
    """Fit for a batch; with what it started."""
    probe = StartingWeights()
    fit(model, make_batches(1), [*callbacks, probe], **arguments)
    return probe


def silent(policy: Any = None) -> Initialization:
    return Initialization(policy, verbose=False)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_weights_are_those_of_the_policy() -> None:
    model = NormNet()
    before = weights(model)
    callback = silent(Xavier(gain=2.0))
    started = start(model, callback).weights
    assert not torch.equal(started["net.0.weight"], before["net.0.weight"])
    assert not started["net.0.bias"].any()
    assert torch.equal(started["net.1.weight"], before["net.1.weight"])
    report = callback.report
    assert isinstance(report, InitReport)
    assert report["net.0.weight"].what == "Xavier uniform, gain 2"
    assert report["net.0.weight"].std_after == pytest.approx(float(started["net.0.weight"].std(correction=0)), rel=1e-5)


def test_default_policy_is_auto() -> None:
    assert isinstance(Initialization().policy, Auto)
    callback = silent()
    start(NormNet(), callback)
    assert callback.report is not None
    assert callback.report["net.0.weight"].what == "Kaiming normal, fan_in 4, gain 1.41 (before ReLU)"


@pytest.mark.parametrize("build", [NormNet, SparseNet, TiedNet])
def test_weights_depend_on_the_seed_alone(build: type[NormNet]) -> None:
    starts = []
    for seed in (1, 1, 2):
        pl.seed_everything(seed, verbose=False)
        starts.append(start(build(), silent()).weights)
    assert same(starts[0], starts[1])
    assert not same(starts[0], starts[2])


def test_random_state_of_training_is_left_as_it_was() -> None:
    drawn = []
    for callbacks in ([], [silent()]):
        pl.seed_everything(3, verbose=False)
        drawn.append(start(NormNet(), *callbacks).randomness)
    assert drawn[0] == drawn[1]


def test_optimizers_train_what_was_initialized() -> None:
    model, callback = NormNet(), silent()
    started = start(model, callback).weights
    assert not torch.equal(model.net[0].weight, started["net.0.weight"])
    assert callback.report is not None


def test_layers_of_configure_model_are_initialized() -> None:
    class Late(NormNet):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    callback = silent(Normal(std=3.0))
    started = start(Late(), callback).weights
    assert float(started["net.0.weight"].std()) == pytest.approx(3.0, rel=0.4)


def checkpoint_of(model: pl.LightningModule, path: Path, callbacks: list[pl.Callback]) -> str:
    trainer = fit(model, make_batches(2), callbacks)
    trainer.save_checkpoint(path / "model.ckpt")
    return str(path / "model.ckpt")


@pytest.mark.parametrize("saved_with", [True, False], ids=["saved with the callback", "saved without"])
def test_a_resumed_run_keeps_its_weights(tmp_path: Path, saved_with: bool) -> None:
    trained = NormNet()
    path = checkpoint_of(trained, tmp_path, [silent()] if saved_with else [])
    callback = silent(Normal(std=9.0))
    started = start(NormNet(), callback, ckpt_path=path, max_epochs=2).weights
    assert same(started, weights(trained))
    assert callback.report is None


def test_a_model_that_was_resumed_keeps_its_weights_afterwards(tmp_path: Path) -> None:
    path = checkpoint_of(NormNet(), tmp_path, [])
    model = NormNet()
    start(model, silent(), ckpt_path=path, max_epochs=2)
    trained = weights(model)
    assert same(start(model, silent(Normal(std=9.0))).weights, trained)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    batches = make_batches(4)
    torch.manual_seed(0)
    whole = NormNet()
    fit(whole, batches, [silent()], max_epochs=2)
    torch.manual_seed(0)
    first = NormNet()
    fit(first, batches, [silent()], max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    second = NormNet()
    fit(second, batches, [silent()], max_epochs=2, ckpt_path=str(tmp_path / "half.ckpt"))
    assert same(weights(second), weights(whole))


def test_a_second_fit_keeps_the_weights() -> None:
    model, callback = NormNet(), silent()
    trainer = fit(model, make_batches(2), [callback])
    trained = weights(model)
    trainer.fit_loop.max_epochs = 2
    probe = StartingWeights()
    trainer.callbacks.append(probe)
    trainer.fit(model, train_dataloaders=ResumableLoader(make_batches(2)))
    assert same(probe.weights, trained)


def test_another_trainer_keeps_the_weights_that_training_left() -> None:
    model = NormNet()
    fit(model, make_batches(2), [silent()])
    trained = weights(model)
    assert same(start(model, silent(Normal(std=9.0))).weights, trained)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_fitted_model_keep_their_weights(twin_of: Any) -> None:
    model = NormNet()
    start(model, silent())
    trained = weights(model)
    assert same(start(twin_of(model), silent(Normal(std=9.0))).weights, trained)


def test_the_mark_is_no_part_of_the_state_dict() -> None:
    model = NormNet()
    names = set(model.state_dict())
    start(model, silent())
    assert set(model.state_dict()) == names


def test_a_trainer_that_has_trained_leaves_other_models_alone() -> None:
    callback = silent()
    trainer = fit(NormNet(), make_batches(2), [callback])
    other = NormNet()
    before = weights(other)
    probe = StartingWeights()
    trainer.callbacks.append(probe)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, train_dataloaders=ResumableLoader(make_batches(2)))
    assert same(probe.weights, before)


def test_a_fresh_model_in_a_fresh_trainer_is_initialized_by_the_same_callback() -> None:
    callback = silent(Normal(std=9.0))
    for _ in range(2):
        assert float(start(NormNet(), callback).weights["net.0.weight"].std()) > 4


class Evaluated(NormNet):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    test_step = predict_step = validation_step


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_evaluation_touches_nothing() -> None:
    model, callback = Evaluated(), silent()
    before = weights(model)
    trainer = pl.Trainer(
        callbacks=[callback], logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu"
    )
    loader = ResumableLoader(make_batches(1))
    trainer.validate(model, loader, verbose=False)
    trainer.test(model, loader, verbose=False)
    trainer.predict(model, loader)
    assert same(weights(model), before)
    assert callback.report is None
    assert float(start(model, silent(Normal(std=9.0))).weights["net.0.weight"].std()) > 4  # still as good as new


@pytest.mark.parametrize(
    "arguments",
    [{"fast_dev_run": True}, {"overfit_batches": 1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}],
    ids=str,
)
def test_other_ways_to_run(arguments: dict[str, Any]) -> None:
    callback = silent()
    model = NormNet()
    probe = StartingWeights()
    batches = make_batches(2)
    if arguments.get("precision") == "bf16-true":
        batches = [(x.bfloat16(), y) for x, y in batches]
    fit(model, batches, [callback, probe], **arguments)
    assert not probe.weights["net.0.bias"].any()
    assert callback.report is not None


def test_frozen_and_tied_weights_are_reported() -> None:
    callback = silent()
    model = TiedNet()
    frozen = model.frozen.weight.detach().clone()
    start(model, callback)
    assert torch.equal(model.frozen.weight, frozen)
    assert callback.report is not None
    assert callback.report["second.weight"].what == "left alone: tied to first.weight"
    assert callback.report["frozen.weight"].what == "left alone: frozen"


def test_two_callbacks_for_two_parts() -> None:
    body, head = silent(ByPattern({r"net\.0": Normal(std=1.0)})), silent(ByPattern({r"net\.3": Normal(std=1.0)}))
    started = start(NormNet(), body, head).weights
    assert not started["net.0.bias"].any()
    assert not started["net.3.bias"].any()
    first, last = started["net.0.weight"].flatten()[:8], started["net.3.weight"].flatten()[:8]
    assert not torch.allclose(first, last)  # they do not draw the same numbers


class RateNet(NormNet):
    """A model whose learning rate a finder can set."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.1

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(make_batches(12))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class FinderProbe(LearningRateFinder):
    """Notes the weights that the finder sees."""

    def lr_find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights(pl_module)
        super().lr_find(trainer, pl_module)


FINDER = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's own: short runs, missing workers


@FINDER
@pytest.mark.parametrize("finder_first", [True, False])
def test_a_learning_rate_finder_sees_the_initialized_model(finder_first: bool) -> None:
    finder, callback, probe = FinderProbe(num_training_steps=6), silent(Normal(std=3.0)), StartingWeights()
    callbacks = [finder, callback, probe] if finder_first else [callback, probe, finder]
    model = RateNet()
    trainer = pl.Trainer(
        callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model)
    assert float(finder.weights["net.0.weight"].std()) > 1.5
    assert same(probe.weights, finder.weights)
    assert finder in trainer.callbacks


@FINDER
def test_the_tuner_and_the_fit_after_it_see_the_same_weights() -> None:
    callback, probe, model = silent(Normal(std=3.0)), StartingWeights(), RateNet()
    trainer = pl.Trainer(
        callbacks=[callback, probe], logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        accelerator="cpu",
    )  # fmt: skip
    Tuner(trainer).lr_find(model, num_training=6)
    assert callback.report is not None
    found = weights(model)
    trainer.fit(model)
    assert same(probe.weights, found)
    assert float(found["net.0.weight"].std()) > 1.5


class Forward(NormNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_policies_that_look_at_data_get_the_first_batch() -> None:
    callback, model = silent(LSUV(tolerance=0.01)), Forward()
    batches = [(10 * x, y) for x, y in make_batches(3)]
    probe = StartingWeights()
    trainer = fit(model, batches, [callback, probe])
    outputs = batches[0][0] @ probe.weights["net.0.weight"].T
    assert float(outputs.var(correction=0)) == pytest.approx(1.0, abs=0.011)
    assert probe.weights["net.1.num_batches_tracked"] == 0
    assert trainer.global_step == 3  # the batch is still trained on


def test_random_state_with_a_policy_that_looks_at_data() -> None:
    class Shuffled(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return torch.randn(4), index % 3  # draws from the state of training

    drawn = []
    for callbacks in ([], [silent(LSUV())]):
        pl.seed_everything(3, verbose=False)
        probe = StartingWeights()
        loader = torch.utils.data.DataLoader(Shuffled(), batch_size=4, shuffle=True)
        fit(Forward(), loader, [*callbacks, probe])
        drawn.append(probe.randomness)
    assert drawn[0] == drawn[1]


def test_report_is_printed_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    start(NormNet(), Initialization())
    printed = capsys.readouterr().out
    assert "Initialization: 6 of 6 parameters written" in printed
    assert "net.0.weight" in printed
    start(NormNet(), silent())
    assert "net.0.weight" not in capsys.readouterr().out


def test_strategies_that_hide_the_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NormNet()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    before = weights(model)
    strategy = FSDPStrategy()
    strategy.connect(model)
    monkeypatch.setattr(type(trainer), "strategy", property(lambda self: strategy))
    callback = silent()
    with pytest.raises(MisconfigurationException, match=r"does not work with FSDPStrategy.*ModelParallelStrategy"):
        callback.on_fit_start(trainer, model)
    assert same(weights(model), before)


def test_a_failed_initialization_leaves_no_mark() -> None:
    model = NormNet()
    with pytest.raises(ValueError, match="not_there"):
        start(model, silent(ByPattern({"not_there": Normal()})))
    assert float(start(model, silent(Normal(std=9.0))).weights["net.0.weight"].std()) > 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("xavier",), "`policy` must be an initialization policy such as Auto.*got 'xavier' of type str"),
        ((Auto,), r"`policy` must be .*a class was passed: call it to make an instance"),
        ((Auto(), "yes"), "`verbose` must be True or False, got 'yes'"),
        ((Auto(), True, 1), "`check` must be True or False, got 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Initialization(*arguments)


@pytest.fixture
def used() -> Initialization:
    callback = silent(Xavier())
    start(NormNet(), callback)
    return callback


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_callback_survives_copies_and_pickles(used: Initialization, twin_of: Any) -> None:
    twin = twin_of(used)
    assert vars(twin.policy) == vars(used.policy)
    assert twin.report == used.report
    assert twin.verbose is False
    model = NormNet()
    start(model, twin)
    assert twin.report is not None


# ---- the check


def checking(policy: Any = None) -> Initialization:
    return Initialization(policy, verbose=False, check=True)


class Eventful(NormNet):
    """Draws random numbers, logs, counts, and keeps a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.seen = torch.zeros((), dtype=torch.long)
        self.counts: dict[str, int] = {"steps": 0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(self.dropout(x)) + random.random(), y)
        self.seen += len(y)
        self.counts["steps"] += 1
        self.log("loss", loss)
        self.log_dict({"seen": float(self.seen), "steps": float(self.counts["steps"])})
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(loss.detach())}, step=self.trainer.global_step)
        return {"loss": loss, "counts": self.counts}


class Shuffled(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return torch.randn(4) + index, index % 3  # draws from the state of training


def loaders() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "resumable": ResumableLoader(make_batches(4)),
        "shuffled": torch.utils.data.DataLoader(Shuffled(), batch_size=4, shuffle=True),
        "own generator": torch.utils.data.DataLoader(Shuffled(), batch_size=4, shuffle=True, generator=generator),
    }


@pytest.mark.parametrize("loader", list(loaders()))
@pytest.mark.parametrize("policy", [None, LSUV()], ids=str)
def test_training_after_a_check_is_the_same_to_the_last_bit(loader: str, policy: Any) -> None:
    class Model(Eventful):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    runs = []
    for callback in (silent(policy), checking(policy)):
        pl.seed_everything(3, verbose=False)
        model, logger = Model(), MemoryLogger()
        trainer = fit(model, loaders()[loader], [callback], logger=logger, max_epochs=2)
        runs.append((training_state(model, trainer), logger.calls, model.seen, model.counts, torch.rand(3)))
        assert (callback.signal_report is not None) is callback.check
    assert_same_bits(runs[0], runs[1])
    assert runs[0][3]["steps"] == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"plugins": fp16},
        {"accumulate_grad_batches": 2},
        {"fast_dev_run": True},
        {"gradient_clip_val": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_check_in_other_ways_to_run(settings: dict[str, Any]) -> None:
    runs = []
    for callback in (silent(), checking()):
        torch.manual_seed(3)
        model = NormNet()
        arguments = {name: value() if callable(value) else value for name, value in settings.items()}
        trainer = fit(model, make_batches(4), [callback], **arguments)
        runs.append((training_state(model, trainer), [parameter.grad for parameter in model.parameters()]))
    assert_same_bits(runs[0], runs[1])
    assert callback.signal_report is not None
    assert callback.signal_report.verdict == "healthy"


def test_a_check_changes_no_weight_of_another_callback() -> None:
    starts = []
    for first in (silent, checking):
        torch.manual_seed(3)
        body, head = first(ByPattern({r"net\.0": Normal(std=1.0)})), silent(ByPattern({r"net\.3": Normal(std=1.0)}))
        probe = StartingWeights()
        fit(NormNet(), torch.utils.data.DataLoader(Shuffled(), batch_size=4, shuffle=True), [body, head, probe])
        starts.append(probe.weights)
    assert same(*starts)


def test_the_check_reports_on_the_first_batch_and_the_initialized_weights() -> None:
    model, callback, probe = NormNet(), checking(), StartingWeights()
    batches = make_batches(3)
    fit(model, batches, [callback, probe])
    twin = NormNet()
    twin.load_state_dict(probe.weights)
    expected = signal_report(twin, batches[0], lambda model, batch: model.training_step(batch, 0))
    assert callback.signal_report == expected
    assert [row.name for row in expected] == ["net.0", "net.1", "net.3"]


def test_a_policy_and_a_check_share_the_batch() -> None:
    class Counted(ResumableLoader):
        begun = 0

        def __iter__(self) -> Any:
            type(self).begun += 1
            return super().__iter__()

    counts = []
    for callback in (silent(), silent(LSUV()), checking(), checking(LSUV())):
        Counted.begun = 0
        fit(Forward(), Counted(make_batches(2)), [callback])
        counts.append(Counted.begun)
    # A batch for the check alone is drawn in a copy of the process.
    assert counts == [counts[0], counts[0] + 1, counts[0], counts[0] + 1]


def test_the_batch_is_as_training_makes_it() -> None:
    class Prepared(NormNet):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"numbers": batch["labeled"], "transferred": False}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "transferred": True}

        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            assert batch["transferred"]
            return self.loss(batch["numbers"])

    callback = checking()
    fit(Prepared(), {"labeled": ResumableLoader(make_batches(2))}, [callback])  # several loaders, by name
    assert callback.signal_report is not None


def test_the_step_runs_in_the_precision_of_training() -> None:
    class Cast(NormNet):
        def loss(self, batch: Any) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            return super().loss(batch)

    callback = checking()
    fit(Cast(), make_batches(2), [callback], precision="bf16-mixed")
    assert callback.signal_report is not None


def test_an_unhealthy_model_is_reported_in_a_warning() -> None:
    callback = checking(Normal(std=50.0))
    with pytest.warns(UserWarning, match="The initialized model is not healthy") as caught:
        start(NormNet(), callback)
    (message,) = [text for each in caught if "not healthy" in (text := str(each.message))]
    assert callback.signal_report is not None
    assert "exploding forward" in callback.signal_report.verdict
    assert "- exploding forward (2 layers, net.0 to net.3): activation std" in message
    assert "Remedy: initialise with Auto() or LSUV()" in message


def test_no_check_unless_asked_for_and_none_on_a_resumed_run(tmp_path: Path) -> None:
    callback = silent()
    start(NormNet(), callback)
    assert callback.signal_report is None
    path = checkpoint_of(NormNet(), tmp_path, [])
    callback = checking()
    start(NormNet(), callback, ckpt_path=path, max_epochs=2)
    assert callback.signal_report is None


def test_manual_optimization_is_not_checked() -> None:
    callback = checking()
    with pytest.warns(UserWarning, match="does not support manual optimization: the model was initialized but not"):
        start(TwoOptimizers(), callback)
    assert callback.report is not None
    assert callback.signal_report is None


class Late(NormNet):
    """Its training step needs what a later hook provides."""

    def on_train_start(self) -> None:
        self.weight_of_classes = torch.ones(3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y, self.weight_of_classes)


def test_a_check_that_fails_does_not_stop_training() -> None:
    callback, model = checking(), Late()
    with pytest.warns(UserWarning, match="could not check the model.*AttributeError.*weight_of_classes"):
        trainer = fit(model, make_batches(3), [callback])
    assert trainer.global_step == 3
    assert callback.report is not None
    assert callback.signal_report is None
    assert "log" not in vars(model)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_without_a_loss_is_not_checked() -> None:
    class Idle(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            pass

    callback = checking()
    with pytest.warns(UserWarning, match="could not check the model.*`loss_fn` must return a scalar tensor.*got None"):
        start(Idle(), callback)
    assert callback.signal_report is None


def test_a_later_fit_without_a_check_forgets_the_report() -> None:
    callback = checking()
    start(NormNet(), callback)
    assert callback.signal_report is not None
    with pytest.warns(UserWarning, match="could not check"):
        start(Late(), callback)
    assert callback.signal_report is None


def test_both_tables_are_printed_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    start(NormNet(), Initialization(check=True))
    printed = capsys.readouterr().out
    assert "Initialization: 6 of 6 parameters written" in printed
    assert "Signal at initialisation: healthy" in printed
    start(NormNet(), checking())
    assert "Signal" not in capsys.readouterr().out


def test_a_callback_that_has_checked_survives_a_pickle() -> None:
    callback = checking()
    start(NormNet(), callback)
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.check is True
    assert twin.signal_report == callback.signal_report
