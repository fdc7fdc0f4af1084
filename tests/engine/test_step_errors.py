"""NaN that arrives as an exception: the step is skipped as if the batch had never been, or the exception goes on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from stability_callbacks import FlightRecorder, StepGuard, TrainingDivergedError, stability_suite
from stability_callbacks.detection import Spike
from stability_callbacks.diagnosis import read_incidents
from tests.models import (
    NormNet,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    poison,
    seeded,
    state_after,
)


class Likelihood(NormNet):
    """A likelihood that checks its arguments, after batch norm has taken them in."""

    def loss(self, batch: Any) -> Tensor:
        mean = self.net(batch[0])
        return -torch.distributions.Normal(mean, 1.0, validate_args=True).log_prob(torch.ones(())).mean()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("plugins", [[], [fp16]], ids=["32", "fp16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_raises_on_bad_numbers_is_skipped(fused: bool, plugins: Any, accumulate: int) -> None:
    def train(batches: Any, *callbacks: Any) -> Any:
        model = seeded(Likelihood, lambda p: torch.optim.Adam(p, lr=0.1, fused=fused))
        return state_after(
            model, batches, callbacks, plugins=[make() for make in plugins], accumulate_grad_batches=accumulate
        )

    batches = make_batches(9)
    window = make_batches(accumulate, seed=1)
    window[-1] = poison(window[-1])
    guard = StepGuard()
    healed, plain = train([*batches[:6], *window, *batches[6:]], guard), train(batches)
    assert guard.skipped_steps == 1
    for part in ("model", "optimizers"):
        assert_same_bits(healed[part], plain[part])


class LikelihoodByHand(TwoOptimizers):
    """Two optimizers; the second loss checks its arguments."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            scores = net(torch.nan_to_num(x)) if net is self.one else net(x)
            torch.distributions.Categorical(logits=scores, validate_args=True)
            self.manual_backward(nn.functional.cross_entropy(scores, y))
            if net is self.two:
                optimizer.step()


def test_manual_optimization_goes_on(tmp_path: Any) -> None:
    batches = make_batches(6)
    bad = [*batches[:3], poison(batches[0]), *batches[3:]]
    guard = StepGuard()
    healed = state_after(seeded(LikelihoodByHand), bad, [guard, FlightRecorder(tmp_path)])
    assert guard.skipped_steps == 1
    assert_same_bits(healed["model"], state_after(seeded(LikelihoodByHand), batches)["model"])
    [incident] = read_incidents(tmp_path / "incidents.jsonl")
    assert "Categorical" in str(incident.evidence["exception"])


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected", "ignore:.*detect_anomaly")
def test_anomaly_detection_does_not_end_training() -> None:
    batches = make_batches(5)
    batches[2] = poison(batches[2])
    guard = StepGuard()
    fit(seeded(NormNet), batches, [guard], detect_anomaly=True)
    assert guard.skipped_steps == 1


class Bug(NormNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            raise KeyError("labels")
        return loss


def test_an_exception_of_the_code_goes_on_and_is_on_record(tmp_path: Any) -> None:
    with pytest.raises(KeyError, match="labels"):
        fit(Bug(), make_batches(5), [StepGuard(), FlightRecorder(tmp_path)])
    [incident] = read_incidents(tmp_path / "incidents.jsonl")
    assert (incident.kind, incident.step, incident.evidence["exception"]) == ("exception", 3, "KeyError: 'labels'")
    assert 'raise KeyError("labels")' in str(incident.evidence["raised_at"])


@pytest.mark.parametrize("callbacks", [[], [StepGuard([Spike()])]])
def test_without_somebody_to_skip_it_the_exception_goes_on(callbacks: Any, tmp_path: Any) -> None:
    batches = make_batches(3)
    batches[1] = poison(batches[1])
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        fit(Likelihood(), batches, [*callbacks, FlightRecorder(tmp_path)])
    [incident] = read_incidents(tmp_path / "incidents.jsonl")
    assert incident.kind == "exception"


def test_the_same_bounds_hold() -> None:
    bad = [poison(batch) for batch in make_batches(6)]
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row .*ValueError: Expected parameter loc"):
        fit(Likelihood(), bad, [StepGuard(max_consecutive_skips=3)])


def test_the_record_and_the_warning_name_the_exception_and_its_line(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = make_batches(5)
    batches[3] = poison(batches[3])
    fit(Likelihood(), batches, [StepGuard(), FlightRecorder(tmp_path)])
    [incident] = read_incidents(tmp_path / "incidents.jsonl")
    assert (incident.kind, incident.step, incident.action) == ("nonfinite", 3, "skipped")
    assert str(incident.evidence["exception"]).startswith("ValueError: Expected parameter loc")
    assert "torch.distributions.Normal(mean" in str(incident.evidence["raised_at"])
    [warning] = [each.getMessage() for each in caplog.records if "Skipped step" in each.getMessage()]
    assert "ValueError: Expected parameter loc" in warning
    assert "torch.distributions.Normal(mean" in warning
    assert "gradient" not in warning  # no backward pass ran


def test_the_model_gets_its_own_step_back() -> None:
    model = NormNet()
    trainer = fit(model, make_batches(2), stability_suite("mlp"))
    assert "training_step" not in vars(model)
    assert "backward" not in vars(trainer.strategy)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_in_the_middle_of_training_trains_itself(copied: Any) -> None:
    class Copies(pl.Callback):
        copies: list[pl.LightningModule]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.copies = [copied(pl_module)]

    copies = Copies()
    fit(Likelihood(), make_batches(2), [StepGuard(), copies])
    [model] = copies.copies
    assert model.training_step.__self__ is model
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        model.loss(poison(make_batches(1)[0]))


class ChecksLabels(NormNet):
    """A mistake in the code, near targets that hold NaN on purpose."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        targets = torch.full((8,), float("nan"))
        if batch_idx >= 2:
            raise ValueError(f"unknown label {int(targets.isnan().sum())}")
        return super().training_step(batch, batch_idx)


def test_a_mistake_in_the_code_near_missing_values_soon_ends_training() -> None:
    guard = StepGuard()
    with pytest.raises(ValueError, match="unknown label 8"):
        fit(ChecksLabels(), make_batches(20), [guard])
    assert guard.skipped_steps == 3


def test_optimizers_are_untoggled_after_an_exception() -> None:
    class Toggling(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for layer, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                self.toggle_optimizer(optimizer)
                out = layer(batch)
                torch.distributions.Normal(out, 1.0, validate_args=True)
                optimizer.zero_grad()
                self.manual_backward(out.pow(2).mean())
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.first, self.second)]

    batches = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    batches[1, 0, 0] = float("nan")
    model, guard = Toggling(), StepGuard()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[guard],
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert guard.skipped_steps == 1
    assert all(parameter.requires_grad for parameter in model.parameters())
