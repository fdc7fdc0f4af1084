"""What the guard skips, what it says, and when it gives up. That a skip is a perfect no-op: see ``test_laws.py``."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from stability_callbacks import GradientMonitor, StepGuard, TrainingDivergedError
from stability_callbacks.detection import Detector, NonFinite, StepEvidence
from tests.models import (
    BufferNet,
    LossNet,
    MemoryLogger,
    NormNet,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    loader_of,
    make_batches,
    make_trainer,
    poison,
    sgd,
)

# Two of a class in one list are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:There are 2 (guards|clippings)")

NAN, INF = float("nan"), float("inf")


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


OPTIMIZERS = [pytest.param(sgd, id="known to the host"), pytest.param(fused, id="on the device")]


def batches_of(pattern: str) -> list[Any]:
    """A batch for each letter: ``.`` for a good one, ``x`` for a bad one."""
    return [poison(b) if letter == "x" else b for b, letter in zip(make_batches(len(pattern)), pattern, strict=True)]


class Large(Detector):
    """Votes against gradients above a norm."""

    kind: ClassVar[str] = "large"

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.seen = 0

    def __repr__(self) -> str:
        return f"Large({self.bound})"

    def __call__(self, evidence: StepEvidence) -> Tensor:
        self.seen += 1
        return evidence.gradients.total > self.bound

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


# ---- what is skipped


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("model", [NormNet, BufferNet, LossNet])
def test_bad_gradients_buffers_and_losses_are_skipped(model: Any, value: float, optimizer: Any) -> None:
    guard = StepGuard()
    batches = make_batches(5)
    batches[1] = poison(batches[1], value)
    batches[3] = poison(batches[3], value)
    net = model(optimizer)
    fit(net, batches, [guard])
    assert guard.skipped_steps == 2
    assert all(value.isfinite().all() for name, value in net.state_dict().items() if name != "mask")


def test_buffers_that_are_not_finite_from_the_start_are_no_evidence() -> None:
    guard, net = StepGuard(), BufferNet()
    net.register_buffer("unknown", torch.tensor(NAN))
    fit(net, make_batches(4), [guard])
    assert guard.skipped_steps == 0
    assert net.mask.isinf().any()


def test_unprotected_buffers_are_neither_watched_nor_restored() -> None:
    guard, net = StepGuard(protect_buffers=False), BufferNet()
    fit(net, batches_of(".x."), [guard])
    assert guard.skipped_steps == 0
    assert net.input_mean.isnan().any()
    guard, normed = StepGuard(protect_buffers=False), NormNet()
    fit(normed, batches_of(".x."), [guard])
    assert guard.skipped_steps == 1
    assert normed.net[1].num_batches_tracked == 3
    assert normed.net[1].running_mean.isnan().any()


def test_each_detector_has_a_vote(caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard([Large(INF), NonFinite(), Large(0.0)])
    net = NormNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="stability_callbacks"):
        fit(net, batches_of(".x"), [guard])
    assert guard.skipped_steps == 2
    assert_same_bits(net.state_dict(), before)
    first, second = (record.getMessage() for record in caplog.records)
    assert ", large: loss" in first
    assert ", nonfinite: loss nan" in second  # NaN is not larger than anything


@pytest.mark.filterwarnings("ignore:There are 2 guards")
def test_two_guards_in_one_trainer(tmp_path: Any) -> None:
    strict, lenient = StepGuard([Large(0.0)]), StepGuard()
    net = NormNet()
    trainer = fit(net, batches_of("..x"), [strict, lenient])
    assert strict.skipped_steps == lenient.skipped_steps == 3  # a step is skipped or not, for everyone
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    keys = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert {strict.state_key, lenient.state_key} <= set(keys)


def test_each_optimizer_is_judged_for_itself() -> None:
    class OneIsBad(TwoOptimizers):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            super().manual_backward(loss, *args, **kwargs)
            for parameter in self.one.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(NAN)

    guard, net = StepGuard(), OneIsBad()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(net, make_batches(3), [guard])
    assert guard.skipped_steps == 3
    assert torch.equal(net.one[0].weight, before["one.0.weight"])
    assert not torch.equal(net.two.weight, before["two.weight"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overflows_under_a_loss_scale_are_skips(optimizer: Any) -> None:
    guard, logger = StepGuard(), MemoryLogger()
    trainer = fit(NormNet(optimizer), make_batches(30), [guard], plugins=[fp16(2.0**24)], logger=logger)
    scale = trainer.precision_plugin.scaler.get_scale()
    assert guard.skipped_steps > 0
    assert scale == 2.0 ** (24 - guard.skipped_steps)
    scales = logger.values("stability/loss_scale")
    assert scales[0] == 2.0**24
    assert scales[29] == scale


def test_there_is_no_loss_scale_to_log_without_one() -> None:
    logger = MemoryLogger()
    fit(NormNet(), make_batches(2), [StepGuard()], logger=logger)
    assert logger.names() == {"stability/skipped_steps"}


# ---- what it says


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skips_are_counted_in_a_metric(optimizer: Any) -> None:
    logger = MemoryLogger()
    fit(NormNet(optimizer), batches_of("..x.xx.."), [StepGuard()], logger=logger, log_every_n_steps=2)
    assert logger.values("stability/skipped_steps") == {1: 0, 3: 1, 5: 3, 7: 3}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skips_are_announced_with_step_and_place(optimizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="stability_callbacks"):
        fit(NormNet(optimizer), batches_of("..x"), [StepGuard()], max_epochs=2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(
        f"Skipped step 2 (epoch 0, batch 2, {type(optimizer([torch.zeros(1)])).__name__}), nonfinite"
    )
    assert "loss nan, gradient norm nan" in first
    assert "non-finite gradients in 6 of 6 parameters, first net.0.weight" in first
    assert "non-finite buffers net.1.running_mean, net.1.running_var" in first
    assert first.endswith("1 skipped so far.")
    assert second.startswith("Skipped step 5 (epoch 1, batch 2")


@pytest.mark.parametrize("on_the_device", [False, True])
def test_the_place_is_that_of_the_optimizer_that_skipped(on_the_device: bool) -> None:
    class SecondIsBad(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, net in zip(self.optimizers(), (self.two, self.one), strict=True):
                optimizer.zero_grad()
                poisoned = net is self.two and batch_idx == 1
                self.manual_backward(net(batch[0]).square().mean() * (NAN if poisoned else 1.0))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.1, fused=on_the_device) for net in (self.two, self.one)]

    with pytest.raises(TrainingDivergedError, match=r"batch 1, SGD\), .* in 2 of 2 parameters, first two.weight\. "):
        fit(SecondIsBad(), make_batches(3), [StepGuard(max_consecutive_skips=1)], log_every_n_steps=100)


def test_many_skips_are_announced_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="stability_callbacks"):
        fit(NormNet(), batches_of("x" * 110), [StepGuard(max_consecutive_skips=1000)])
    told = [record.getMessage() for record in caplog.records]
    assert told.pop(10) == "Further skips are only counted, in stability/skipped_steps and in the record."
    assert [int(each.split()[-4]) for each in told] == [*range(1, 11), 100]


# ---- when it gives up


def diverges(guard: StepGuard, pattern: str, optimizer: Any = sgd, **arguments: Any) -> tuple[str, pl.LightningModule]:
    torch.manual_seed(0)
    net = NormNet(optimizer)
    with pytest.raises(TrainingDivergedError) as caught:
        fit(net, batches_of(pattern), [guard, GradientMonitor(histograms=False)], **arguments)
    return str(caught.value), net


def test_too_many_skips_in_a_row_stop_training() -> None:
    guard = StepGuard(max_consecutive_skips=3)
    message, net = diverges(guard, "..xx.xxx...")
    assert guard.skipped_steps == 5
    assert "3 steps in a row were skipped (max_consecutive_skips)" in message
    assert "step 7 (epoch 0, batch 7, SGD), nonfinite: loss nan, gradient norm nan" in message
    assert "first net.0.weight" in message
    torch.manual_seed(0)
    last_good = NormNet()
    fit(last_good, [b for b, letter in zip(batches_of("..xx."), "..xx.", strict=True) if letter == "."])
    assert_same_bits(net.state_dict(), last_good.state_dict())


def test_fewer_in_a_row_do_not() -> None:
    guard = StepGuard(max_consecutive_skips=3, max_skipped_share=1.0)
    fit(NormNet(), batches_of("xx.xx.xx."), [guard])
    assert guard.skipped_steps == 6


def test_too_large_a_share_of_recent_steps_stops_training() -> None:
    message, _ = diverges(StepGuard(max_skipped_share=0.4, share_window=10), "xx.x..x...xxx......")
    # The first ten hold 40 %, which is allowed; the window that ends in the last bad one holds 5 of 10.
    assert "50% of the last 10 steps were skipped, more than max_skipped_share=0.4" in message
    assert "step 12 " in message


def test_the_share_is_judged_once_the_window_is_full() -> None:
    guard = StepGuard(max_skipped_share=0.4, share_window=10)
    fit(NormNet(), batches_of("xxxxx...."), [guard])
    assert guard.skipped_steps == 5


@pytest.mark.parametrize(("every", "end"), [(1, 3), (4, 4), (100, 8)])
def test_on_the_device_divergence_is_found_at_the_next_log_or_the_epochs_end(every: int, end: int) -> None:
    guard = StepGuard(max_consecutive_skips=2)
    attempts = Attempts()
    net = NormNet(fused)
    with pytest.raises(TrainingDivergedError, match=r"2 steps in a row .* step 2 \(epoch 0, batch 2, AdamW\)"):
        fit(net, batches_of(".xx....."), [guard, attempts], log_every_n_steps=every, max_epochs=2)
    assert attempts.count == end


class Attempts(pl.Callback):
    count = 0

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("arguments", [{"max_steps": 4}, {"max_epochs": 1}, {"log_every_n_steps": 0}], ids=str)
def test_divergence_in_the_last_steps_is_never_lost(arguments: dict[str, Any]) -> None:
    arguments = {"log_every_n_steps": 100, **arguments}
    message, _ = diverges(StepGuard(max_consecutive_skips=2), "..xx", fused, **arguments)
    assert "step 3 (epoch 0, batch 3, AdamW)" in message


def test_divergence_by_share_on_the_device() -> None:
    message, _ = diverges(
        StepGuard(max_skipped_share=0.25, share_window=4), "..x...xx....", fused, log_every_n_steps=100
    )
    assert "50% of the last 4 steps" in message
    assert "step 7 " in message


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_divergence_training_may_be_taken_up_again(optimizer: Any) -> None:
    guard = StepGuard(max_consecutive_skips=2)
    trainer = make_trainer([guard], max_epochs=5)
    net = NormNet(optimizer)
    with pytest.raises(TrainingDivergedError):
        trainer.fit(net, loader_of(batches_of("..xx")))
    trainer.fit(net, loader_of(batches_of("..x.")))
    assert trainer.current_epoch == 5
    assert guard.skipped_steps > 2


def test_a_new_trainer_starts_counting_anew() -> None:
    guard = StepGuard(max_consecutive_skips=3)
    for _ in range(2):
        fit(NormNet(), batches_of("xx"), [guard])
        assert guard.skipped_steps == 2


# ---- state


def test_state_survives_a_round_trip_and_can_be_saved_as_plain_data(tmp_path: Any) -> None:
    guard = StepGuard([NonFinite(), Large(1e9)], max_skipped_share=0.9, share_window=5)
    fit(NormNet(), batches_of(".x..xx."), [guard])
    torch.save(guard.state_dict(), tmp_path / "guard.pt")
    state = torch.load(tmp_path / "guard.pt", weights_only=True)
    assert state == {
        "skipped_steps": 3,
        "consecutive_skips": 0,
        "recent": [False, False, True, True, False],
        "detectors": [[{}, {"seen": 7}]],
    }
    other = StepGuard([NonFinite(), Large(1e9)], share_window=5)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.skipped_steps == 3
    assert other.state_key == guard.state_key != StepGuard().state_key


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"detectors": []}, ValueError, "`detectors` must be a non-empty sequence of detectors"),
        ({"detectors": NonFinite()}, TypeError, "`detectors` must be a non-empty sequence"),
        ({"detectors": "nonfinite"}, TypeError, "detectors"),
        ({"detectors": [NonFinite]}, TypeError, r"`detectors\[0\]` must be a detector"),
        ({"detectors": [NonFinite(), 3]}, TypeError, r"`detectors\[1\]` must be a detector, got 3 of type int"),
        ({"max_consecutive_skips": 0}, ValueError, "`max_consecutive_skips` must be an integer >= 1, got 0"),
        ({"max_consecutive_skips": 2.5}, TypeError, "`max_consecutive_skips` must be an integer"),
        ({"max_skipped_share": 0}, ValueError, "`max_skipped_share` must be a number > 0 and <= 1, got 0"),
        ({"max_skipped_share": 1.1}, ValueError, "`max_skipped_share` must be .* got 1.1"),
        ({"max_skipped_share": NAN}, ValueError, "`max_skipped_share`"),
        ({"protect_buffers": "yes"}, TypeError, "`protect_buffers` must be True or False, got 'yes'"),
        ({"share_window": 0}, ValueError, "`share_window` must be an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StepGuard(**arguments)


class GrowingCache(NormNet):
    """A cache that is replaced by a larger one as training goes on, as rotary embeddings do."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def loss(self, batch: Any) -> Any:
        self.cache = torch.zeros(len(self.cache) + 1)
        return super().loss(batch)


def test_a_buffer_that_grows_does_not_end_training_with_a_fused_optimizer() -> None:
    batches = make_batches(5)
    batches[2] = poison(batches[2])
    guard = StepGuard()
    model = GrowingCache(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True))
    fit(model, batches, [guard])
    assert guard.skipped_steps == 1
    assert len(model.cache) == 5  # the skipped step's growth was undone
