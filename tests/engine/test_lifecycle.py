"""How our callbacks share the life of a step: whoever drives it, whatever else goes on inside and around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from stability_callbacks import GradientClipping, GradientMonitor, LRSchedule, StepGuard, stability_suite
from stability_callbacks.clipping import NormClip
from stability_callbacks.schedules import WarmupConstant, WarmupCosine
from tests.models import (
    MemoryLogger,
    NormNet,
    TinyModel,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    loader_of,
    make_batches,
    make_trainer,
    poison,
    seeded,
    sgd,
    state_after,
)

# Two of a class in one list are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:There are 2 (guards|clippings)")


# ---- counters can be read at any time


class ReadsCounters(pl.Callback):
    """Reads the guard's counter and state at the end of each batch."""

    def __init__(self, guard: StepGuard) -> None:
        self.guard = guard
        self.seen: list[int] = []

    def read(self, *args: Any) -> None:
        self.seen.append(self.guard.skipped_steps)
        self.guard.state_dict()

    on_train_batch_end = read


class ReadsCountersEverywhere(ReadsCounters):
    """Reads them between the verdict and the update, too."""

    on_before_optimizer_step = on_before_zero_grad = on_after_backward = ReadsCounters.read


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("plugins", [[], [fp16]], ids=["32", "fp16"])
def test_reading_a_counter_in_the_middle_of_a_step_changes_nothing(plugins: list[Any], accumulate: int) -> None:
    batches = make_batches(8)
    batches[2] = poison(batches[2])

    def train(*extra: Callable[[StepGuard], pl.Callback]) -> tuple[StepGuard, Any]:
        guard = StepGuard()
        callbacks = [guard, GradientClipping(NormClip(0.5)), *(make(guard) for make in extra)]
        state = state_after(
            seeded(NormNet), batches, callbacks, plugins=[p() for p in plugins], accumulate_grad_batches=accumulate
        )
        return guard, state

    read, state = train(ReadsCountersEverywhere)
    plain, expected = train()
    assert_same_bits(state, expected)
    assert read.skipped_steps == plain.skipped_steps == 1
    assert read.state_dict() == plain.state_dict()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("plugins", [[], [fp16]], ids=["32", "fp16"])
@pytest.mark.parametrize("fused", [False, True])
def test_counters_are_up_to_date_at_the_end_of_each_batch(fused: bool, plugins: list[Any], first: bool) -> None:
    batches = make_batches(5)
    batches[2] = poison(batches[2])
    guard = StepGuard()
    reader = ReadsCounters(guard)
    callbacks = [reader, guard] if first else [guard, reader]
    model = NormNet(lambda p: torch.optim.SGD(p, lr=0.1, fused=fused))
    fit(model, batches, callbacks, log_every_n_steps=50, plugins=[make() for make in plugins])
    assert reader.seen == [0, 0, 1, 1, 1]


# ---- optimizers with a `step` of their own


class PassesClosureOn(torch.optim.AdamW):
    """Hands the closure on to `super().step`, whose hooks fire too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class CallsClosureItself(torch.optim.AdamW):
    """Evaluates the closure and calls `super().step` without it."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


class StepsTwice(torch.optim.AdamW):
    """Takes two half steps with the same gradients."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        super().step()
        return loss


@pytest.mark.parametrize("plugins", [[], [fp16]], ids=["32", "fp16"])
@pytest.mark.parametrize("optimizer", [PassesClosureOn, CallsClosureItself])
def test_optimizers_that_derive_from_one_of_torch(optimizer: type[torch.optim.AdamW], plugins: list[Any]) -> None:
    batches = make_batches(6)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from now on `super().step` fires the hooks as well
    assert hasattr(torch.optim.AdamW.step, "hooked")

    def train(cls: type[torch.optim.AdamW]) -> tuple[Any, Any]:
        logger, guard = MemoryLogger(), StepGuard()
        callbacks = [GradientMonitor(histograms=False), GradientClipping(NormClip(0.1)), guard]
        callbacks.append(LRSchedule(WarmupCosine(warmup=3)))
        model = seeded(NormNet, lambda p: cls(p, lr=0.1))
        bad = [*batches[:2], poison(batches[0]), *batches[2:]]
        state = state_after(model, bad, callbacks, logger=logger, plugins=[make() for make in plugins])
        assert guard.skipped_steps == 1
        return state, [{k.replace(cls.__name__, "AdamW"): v for k, v in m.items()} for _, m in logger.calls]

    assert_same_bits(train(optimizer), train(torch.optim.AdamW))


def test_an_optimizer_that_steps_twice_inside_is_one_step() -> None:
    schedule = LRSchedule(WarmupConstant(warmup=10))
    model = NormNet(lambda p: StepsTwice(p, lr=0.1))
    fit(model, make_batches(4), [schedule, StepGuard()])
    assert schedule.state_dict()["attempted_steps"] == [4]


class SharpnessAware(torch.optim.SGD):
    """Evaluates the closure twice."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, lambda p: SharpnessAware(p, lr=0.1)])
def test_optimizers_with_several_closures_a_step_are_refused(make: Any) -> None:
    model = NormNet(make)
    before = model.net[0].weight.clone()
    with pytest.raises(MisconfigurationException, match=r"(LBFGS|SharpnessAware).*several times in a step"):
        fit(model, make_batches(2), [GradientMonitor()])
    assert torch.equal(model.net[0].weight, before)


# ---- exceptions inside a step


class RaisesInArithmetic(torch.optim.SGD):
    """Raises between closure and update when it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        if self.fails:
            self.fails = False
            raise ArithmeticError
        super().step()
        return loss


class CatchesErrors(pl.LightningModule):
    """Manual optimization that survives a step that raises, before, in and after what our callbacks do in it."""

    def __init__(self, fails_at: dict[int, str], retry: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 3)
        self.fails_at = fails_at
        self.retry = retry
        self.fails = ""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.fails = self.fails_at.get(batch_idx, "")
        x, y = batch
        optimizer = self.optimizers()
        optimizer.optimizer.fails = self.fails == "in the arithmetic"

        def closure() -> Tensor:
            if self.fails == "in the closure":
                raise ArithmeticError
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.manual_backward(loss)
            return loss

        try:
            optimizer.step(closure=closure)
        except ArithmeticError:
            self.fails = ""
            if self.retry:
                optimizer.step(closure=closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.fails == "after the verdict":
            raise ArithmeticError

    def configure_optimizers(self) -> Any:
        return RaisesInArithmetic(self.parameters(), lr=0.5)


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("when", ["in the closure", "after the verdict", "in the arithmetic"])
def test_training_goes_on_after_a_step_that_raised(when: str, retry: bool) -> None:
    def train(fails_at: dict[int, str], batches: Any) -> tuple[Any, LRSchedule, StepGuard]:
        schedule, guard = LRSchedule(WarmupConstant(warmup=10, start=0.5)), StepGuard()
        model = seeded(CatchesErrors, fails_at, retry)
        return state_after(model, batches, [schedule, GradientClipping(NormClip(0.1)), guard]), schedule, guard

    batches = make_batches(5)
    caught, schedule, guard = train({1: when, 3: when}, batches)
    expected, _, _ = train({}, batches if retry else [batches[0], batches[2], batches[4]])
    assert_same_bits(caught, expected)
    assert schedule.state_dict()["attempted_steps"] == [5 if retry else 3]
    assert len(guard.state_dict()["recent"]) == (5 if retry else 3)


class Explodes(torch.optim.SGD):
    """Raises in the arithmetic of one step."""

    at = 2

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.at -= 1
        if self.at < 0:
            raise self.error
        super().step()
        return loss

    error: BaseException = ArithmeticError()


class FailsInTrainingStep(NormNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)

    error: BaseException = ArithmeticError()


@pytest.mark.parametrize("error", [ArithmeticError(), RuntimeError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["training_step", "optimizer"])
@pytest.mark.parametrize("last", [False, True])
def test_an_exception_leaves_no_trace(where: str, error: BaseException, last: bool, tmp_path: Any) -> None:
    """Neither rates nor hooks nor half-finished counts, and a saver on exception sees the same wherever it stands."""
    torch.manual_seed(0)
    model = FailsInTrainingStep() if where == "training_step" else NormNet(lambda p: Explodes(p, lr=0.5))
    if where == "training_step":
        model.error = error
    saver = SavesOnException(tmp_path / "last.ckpt")
    callbacks: list[pl.Callback] = [*stability_suite("mlp"), LRSchedule(WarmupConstant(warmup=10))]
    callbacks = [*callbacks, saver] if last else [saver, *callbacks]
    trainer = make_trainer(callbacks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Explodes, "error", error)
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
            trainer.fit(model, loader_of(make_batches(5)))
    [optimizer] = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == (0.05 if where == "training_step" else 0.5)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not hasattr(optimizer, "found_inf")
    checkpoint = torch.load(saver.path, weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]
    [schedule] = [state for key, state in checkpoint["callbacks"].items() if key.startswith("LRSchedule")]
    assert schedule["attempted_steps"] == [2]


class DeviceError(RuntimeError):
    """After an error of the device nothing can be read from it, and torch raises such errors as this."""


class SavesOnException(pl.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:There are 2 guards")
def test_training_may_go_on_with_the_same_trainer_after_an_exception() -> None:
    """What the first fit left behind (a stale verdict, a half-finished window) is no part of the second."""
    batches = make_batches(6)
    model = seeded(NormNet)
    late = StepGuard(max_consecutive_skips=1, max_skipped_share=1.0)
    trainer = make_trainer([StepGuard(), GradientMonitor()], max_epochs=2)
    model.training_step, step = _failing(model.training_step, at=1), model.training_step
    with pytest.raises(DeviceError):
        trainer.fit(model, loader_of(batches))
    model.training_step = step
    trainer.callbacks.append(late)  # a callback that the first fit did not know
    with pytest.raises(RuntimeError, match="1 steps in a row"):
        trainer.fit(model, loader_of([*batches, poison(batches[0])]))


def test_steps_whose_verdicts_were_not_read_before_an_error_are_not_lost() -> None:
    batches = make_batches(6)
    batches[1] = poison(batches[1])
    guard = StepGuard()
    model = NormNet(lambda p: torch.optim.SGD(p, lr=0.1, fused=True))
    trainer = make_trainer([guard], max_epochs=2, log_every_n_steps=100)
    model.training_step, step = _failing(model.training_step, at=3), model.training_step
    with pytest.raises(DeviceError):
        trainer.fit(model, loader_of(batches))
    model.training_step = step
    trainer.fit(model, loader_of(batches))
    assert len(guard.state_dict()["recent"]) == trainer.global_step
    assert guard.skipped_steps == 1 + trainer.current_epoch


def _failing(step: Any, at: int) -> Any:
    def training_step(batch: Any, batch_idx: int) -> Any:
        if batch_idx == at:
            raise DeviceError
        return step(batch, batch_idx)

    return training_step


# ---- windows of gradient accumulation


def test_a_run_resumed_inside_a_window_still_has_buffers_to_restore(tmp_path: Any) -> None:
    """Lightning drops the window's gradients then; a skip must nevertheless find a backup of the buffers."""
    batches = make_batches(8)
    save = SavesAfter(tmp_path / "mid.ckpt", batch_idx=1)
    fit(seeded(NormNet), batches, [StepGuard(), save], accumulate_grad_batches=4)
    guard = StepGuard()
    rest = [*batches[:3], poison(batches[3]), *batches[4:]]
    model = NormNet()
    fit(model, rest, [guard], ckpt_path=save.path, accumulate_grad_batches=4)
    assert guard.skipped_steps == 1
    assert model.net[1].num_batches_tracked > 0
    assert all(value.isfinite().all() for value in model.state_dict().values())


class SavesAfter(pl.Callback):
    def __init__(self, path: Any, batch_idx: int) -> None:
        self.path = path
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch_idx:
            trainer.save_checkpoint(self.path)


def test_a_skip_does_not_undo_what_was_written_to_buffers_between_batches() -> None:
    """In manual optimization too, where a window begins right after the step before."""

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.batches_seen += 1

    for make in (TwoOptimizers, NormNet):
        model = make()
        model.register_buffer("batches_seen", torch.zeros(()))
        guard = StepGuard()
        fit(model, [*make_batches(3), poison(make_batches(1)[0])], [guard, Counts()])
        assert guard.skipped_steps > 0
        assert model.batches_seen == 4


class AccumulatesByHand(pl.LightningModule):
    """Manual optimization that steps after every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.manual_backward(nn.functional.cross_entropy(self.net(x), y) / 3)
        if batch_idx % 3 == 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_windows_of_manual_accumulation_are_dropped_as_a_whole(position: int) -> None:
    batches = make_batches(9)
    window = make_batches(3, seed=1)
    window[position] = poison(window[position])
    healed = state_after(seeded(AccumulatesByHand), [*batches[:3], *window, *batches[3:]], [StepGuard()])
    assert_same_bits(healed, state_after(seeded(AccumulatesByHand), batches))


class LeavesOutByHand(NormNet):
    """Evaluates the closure of some batches without a step, as Lightning's documentation suggests."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx == 1:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


def test_a_batch_that_the_user_left_out_is_no_evidence_against_the_next() -> None:
    batches = make_batches(4)
    batches[1] = poison(batches[1])
    guard = StepGuard(protect_buffers=False)
    fit(LeavesOutByHand(), batches, [guard])
    assert guard.skipped_steps == 0


class StepsTwiceABatch(TwoOptimizers):
    """Manual optimization that steps one of its optimizers twice in a batch, as one trains a critic."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for index in (0, 0, 1):
            optimizer, net = self.optimizers()[index], (self.one, self.two)[index]
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()


@pytest.mark.parametrize("plugins", [[], [fp16]], ids=["32", "fp16"])
def test_no_step_is_lost_where_an_optimizer_steps_twice_in_a_batch(plugins: list[Any]) -> None:
    batches = make_batches(4)
    batches[1] = poison(batches[1])
    guard, schedule = StepGuard(), LRSchedule(WarmupConstant(warmup=4))
    fit(StepsTwiceABatch(), batches, [guard, schedule], plugins=[make() for make in plugins])
    assert guard.skipped_steps == 3
    assert schedule.state_dict()["attempted_steps"] == [8, 4]
    assert guard.state_dict()["recent"] == [*[False] * 3, *[True] * 3, *[False] * 6]


# ---- wrong use


class StepsBehindLightningsBack(TwoOptimizers):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.optimizer.step()


class NeverSteps(TwoOptimizers):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("make", [StepsBehindLightningsBack, NeverSteps])
def test_optimizers_that_bypass_lightning_get_one_warning(make: Any) -> None:
    with pytest.warns(UserWarning, match="see and protect nothing here") as caught:
        fit(make(), make_batches(3), stability_suite("mlp"), max_epochs=3)
    assert len([w for w in caught if "protect nothing" in str(w.message)]) == 1


def test_the_warning_names_the_way_out() -> None:
    with pytest.warns(UserWarning, match=r"step the optimizers that `self.optimizers\(\)` returns"):
        fit(StepsBehindLightningsBack(), make_batches(1), [StepGuard()])


class NoTrainable(NormNet):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.extra = nn.Parameter(torch.ones(()))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * self.extra

    def configure_optimizers(self) -> Any:
        return sgd(list(self.net.parameters()))


class NoOptimizer(NormNet):
    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize("make", [NoTrainable, NoOptimizer])
@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_a_model_without_trainable_parameters_gets_one_warning(make: Any) -> None:
    with pytest.warns(UserWarning, match="No optimizer has a trainable parameter") as caught:
        fit(make(), make_batches(2), stability_suite("mlp"), max_epochs=2)
    ours = [w for w in caught if "stability callbacks" in str(w.message)]
    assert len(ours) == 1, [str(w.message) for w in ours]


def test_ordinary_training_gets_no_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(NormNet(), make_batches(2), [*stability_suite("mlp"), LRSchedule(WarmupCosine())])
        fit(TwoOptimizers(), make_batches(2), stability_suite("mlp"))
    assert not [w for w in caught if "stability" in str(w.message)]


def test_strategies_that_keep_gradients_to_themselves_are_refused() -> None:
    class Keeps(pl.strategies.SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(MisconfigurationException, match="do not work with Keeps"):
        fit(NormNet(), make_batches(1), [StepGuard()], strategy=Keeps("cpu"))


# ---- steps without gradients


class ReturnsNone(NormNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (0, 2) else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("plugins", [[], [fp16]], ids=["32", "fp16"])
def test_a_training_step_that_returns_none_is_not_a_skip(plugins: list[Any]) -> None:
    logger, guard, clipping = MemoryLogger(), StepGuard(max_consecutive_skips=1), GradientClipping(NormClip(0.5))
    model = seeded(ReturnsNone)
    callbacks = [guard, clipping, GradientMonitor()]
    healed = state_after(model, make_batches(4), callbacks, logger=logger, plugins=[make() for make in plugins])
    plain = state_after(
        seeded(ReturnsNone), make_batches(4), [GradientClipping(NormClip(0.5))], plugins=[p() for p in plugins]
    )
    assert_same_bits(healed, plain)
    assert guard.skipped_steps == clipping.nonfinite_norms == 0
    assert list(guard.state_dict()["recent"]) == [False, False]
    assert sorted(logger.values("grad_norm/total")) == [1, 3]


# ---- logging


class Raises(MemoryLogger):
    """A logger whose disk is full, so to say."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise OSError("disk full")


def test_a_logger_that_raises_is_warned_of_once_and_does_not_end_training() -> None:
    batches, good = make_batches(4), MemoryLogger()
    with pytest.warns(UserWarning, match="Raises could not log stability metrics.*disk full") as caught:
        state = state_after(seeded(NormNet), batches, stability_suite("mlp"), logger=[Raises(), good])
    assert len([w for w in caught if "could not log" in str(w.message)]) == 1
    assert_same_bits(state, state_after(seeded(NormNet), batches, stability_suite("mlp")))
    assert set(good.values("grad_norm/total")) == {0, 1, 2, 3}


def test_one_call_per_logger_and_step_and_no_self_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("self.log was called")

    monkeypatch.setattr(pl.LightningModule, "log", refuse)
    monkeypatch.setattr(pl.LightningModule, "log_dict", refuse)
    loggers = [MemoryLogger(), MemoryLogger()]
    callbacks = [*stability_suite("mlp"), LRSchedule(WarmupCosine()), GradientMonitor(per="parameter", every_n_steps=4)]
    fit(NormNet(), make_batches(9), callbacks, logger=loggers, log_every_n_steps=2)
    for logger in loggers:
        assert [step for step, _ in logger.calls] == [1, 3, 5, 7]
    assert_same_bits(loggers[0].calls, loggers[1].calls)
    names = set(loggers[0].calls[-1][1])
    assert names >= {"grad_norm/total", "grad_norm/net.0.weight", "lr/SGD", "stability/skipped_steps"}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_x_axis_is_the_one_that_self_log_uses(accumulate: int) -> None:
    class Logs(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    logger = MemoryLogger()
    fit(
        Logs(),
        make_batches(7),
        stability_suite("mlp"),
        logger=logger,
        log_every_n_steps=2,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    ours, theirs = logger.values("stability/skipped_steps"), logger.values("loss")
    assert list(ours) == [step for step in theirs if step is not None]
    assert len(ours) == {1: 7, 3: 3}[accumulate]


def test_nothing_is_logged_where_the_trainer_logs_nothing() -> None:
    logger = MemoryLogger()
    guard = StepGuard()
    batches = [*make_batches(3), poison(make_batches(1)[0])]
    fit(NormNet(), batches, [guard, GradientMonitor()], logger=logger, log_every_n_steps=0)
    assert not logger.names() & {"grad_norm/total", "stability/skipped_steps"}
    assert guard.skipped_steps == 1


# ---- who drives


def test_callbacks_of_the_module_and_of_the_trainer_share_one_lifecycle() -> None:
    class Brings(NormNet):
        def configure_callbacks(self) -> Any:
            return [StepGuard(), LRSchedule(WarmupConstant(warmup=4))]

    batches = [*make_batches(3), poison(make_batches(1)[0]), *make_batches(2, seed=1)]
    logger = MemoryLogger()
    state = state_after(seeded(Brings), batches, [GradientClipping(NormClip(0.1)), GradientMonitor()], logger=logger)
    callbacks = [StepGuard(), LRSchedule(WarmupConstant(warmup=4)), GradientClipping(NormClip(0.1)), GradientMonitor()]
    expected = MemoryLogger()
    assert_same_bits(state, state_after(seeded(NormNet), batches, callbacks, logger=expected))
    assert_same_bits(logger.calls, expected.calls)


def test_a_callback_may_serve_one_trainer_after_another() -> None:
    callbacks = [*stability_suite("mlp"), LRSchedule(WarmupCosine(warmup=2))]
    batches = [*make_batches(3), poison(make_batches(1)[0])]
    first = state_after(seeded(NormNet), batches, callbacks)
    guard = next(callback for callback in callbacks if isinstance(callback, StepGuard))
    assert guard.skipped_steps == 1
    second = state_after(seeded(NormNet), batches, callbacks)
    assert guard.skipped_steps == 1
    assert_same_bits(first, second)


class Quiet(TinyModel):
    """A model whose hooks must see our work done: the gradients already judged, not yet clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.norms: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        return 100 * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(float(self.net.weight.grad.norm()))

    def configure_gradient_clipping(self, optimizer: Any, **kwargs: Any) -> None:
        for parameter in self.parameters():
            parameter.grad *= 2


def test_the_users_own_changes_to_gradients_come_before_ours() -> None:
    logger, model = MemoryLogger(), Quiet()
    fit(model, make_batches(2), [GradientClipping(NormClip(1e-3)), GradientMonitor()], logger=logger)
    raw, clipped = logger.values("grad_norm/total"), logger.values("grad_norm_clipped/total")
    assert raw[0] > model.norms[0] > 1.0  # measured before the user doubled it
    assert clipped[0] == pytest.approx(1e-3, rel=1e-4)  # clipped after
