"""A step run once more from its bundle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.diagnosis import (
    Bundle,
    Cause,
    Incident,
    RandomState,
    find_cause,
    isolated,
    read_bundle,
    write_bundle,
)
from stability_callbacks.engine import loss_of
from stability_callbacks.replay import ReplayError, build_model, import_factory, replay


class Model(pl.LightningModule):
    """Takes the logarithm of what may not be positive."""

    def __init__(self, width: int = 4, offset: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(width, width)
        self.offset = offset

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.net(batch).abs() + self.offset).log().mean()
        self.log("train_loss", loss)
        return {"loss": loss}


class Safe(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch).abs() + 1.0).log().mean()


class Elsewhere(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch * torch.inf).mean()


class Noisy(pl.LightningModule):
    """Draws random numbers, keeps statistics, and breaks at one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.BatchNorm1d(64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).sum() / (0.0 if batch_idx == 8 else 1.0)


class AsksTrainer(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).mean() * self.trainer.max_steps


class Raises(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("label")


def bundle_of(
    model: nn.Module,
    batches: list[Any],
    cause: Cause | None = None,
    evidence: dict[str, float | str] | None = None,
    **meta: Any,
) -> Bundle:
    incident = Incident(12, 3, 7, 0, "nonfinite", evidence or {"loss": math.nan, "grad_norm": math.nan}, "skipped")
    rng = RandomState.capture()
    state = model.state_dict()
    path = write_bundle(
        Path("bundles"), incident=incident, batches=batches, weights=state, rng=rng, cause=cause, meta=meta
    )
    return read_bundle(path)


def cause_in(model: nn.Module, batch: Any) -> Cause:
    return find_cause(model, lambda: loss_of(model, batch, 0), batch)


def zeros(model: Model) -> Tensor:
    """A batch that the network maps to 0."""
    with torch.no_grad():
        model.net.bias.zero_()
    return torch.zeros(2, model.net.in_features)


def test_the_cause_comes_up_again_from_the_recorded_hyper_parameters() -> None:
    model = Model(width=6)
    batch = zeros(model)
    recorded = cause_in(model, batch)
    assert recorded.operation == "log"
    bundle = bundle_of(model, [batch], recorded, hyper_parameters={"width": 6, "offset": 0.0, "other": 1})
    rebuilt = build_model(Model, bundle)
    assert torch.equal(rebuilt.net.weight, model.net.weight)
    result = replay(bundle, rebuilt)
    assert result.reproduced
    assert result.verdict == "This is the cause on record."
    assert result.found == recorded


def test_a_model_that_was_mended_does_not_reproduce_it() -> None:
    model = Model()
    batch = zeros(model)
    bundle = bundle_of(model, [batch], cause_in(model, batch))
    result = replay(bundle, build_model(Safe, bundle))
    assert not result.reproduced
    assert result.verdict == "The fault was not reproduced."


def test_another_cause_is_told_apart() -> None:
    model = Model()
    batch = zeros(model) + 1
    bundle = bundle_of(model, [batch], Cause(True, "forward", "", "Model", "log", None, "log made 1 NaN"))
    result = replay(bundle, build_model(Elsewhere, bundle))
    assert not result.reproduced
    assert "The cause on record is another: log made 1 NaN" in result.verdict
    assert result.found is not None
    assert result.found.reproduced


def test_a_record_without_a_cause_is_reproduced_by_any() -> None:
    model = Model()
    bundle = bundle_of(model, [zeros(model)])
    result = replay(bundle, build_model(Model, bundle))
    assert result.reproduced
    assert "no cause to compare it with" in result.verdict


def test_micro_batches_come_in_order_with_the_states_that_they_had() -> None:
    model = Noisy()
    batches = [torch.randn(8, 4) for _ in range(2)]
    rng = RandomState.capture()
    bundle = bundle_of(model, batches, None, batch_indices=[7, 8])
    with isolated(model, rng):
        for batch in batches:
            model.net(batch)
        expected = torch.get_rng_state(), model.net[2].running_mean.clone()
    rebuilt = build_model(Noisy, bundle)
    kept: list[Any] = []
    rebuilt.net.register_forward_hook(
        lambda *_: kept.append((torch.get_rng_state(), rebuilt.net[2].running_mean.clone()))
    )
    result = replay(bundle, rebuilt)
    assert result.reproduced
    assert result.found is not None
    assert result.found.operation == "div"
    assert all(map(torch.equal, kept[-1], expected))
    assert not rebuilt.net[2].num_batches_tracked  # in isolation


def test_the_model_knows_where_it_was() -> None:
    class Knows(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert (batch_idx, self.global_step, self.current_epoch) == (7, 12, 3)
            self.logger.experiment.add_scalar("x", 1.0)
            return super().training_step(batch, batch_idx)

    model = Model()
    bundle = bundle_of(model, [zeros(model)])
    assert replay(bundle, build_model(Knows, bundle)).reproduced


def test_a_model_that_asks_its_trainer_for_more_is_refused_with_what_it_asked_for() -> None:
    bundle = bundle_of(Model(), [torch.ones(2, 4)])
    with pytest.raises(ReplayError, match="asks its trainer for `max_steps`, and a replay has none"):
        replay(bundle, build_model(AsksTrainer, bundle))


def test_a_step_that_raises_does_not_reproduce_and_says_so() -> None:
    bundle = bundle_of(Model(), [torch.ones(2, 4)])
    result = replay(bundle, build_model(Raises, bundle))
    assert not result.reproduced
    assert result.found is not None
    assert "KeyError: 'label'" in result.found.explanation


def spike_of(model: Model, batches: list[Tensor], factor: float) -> Bundle:
    losses = [loss_of(model, batch, 0) for batch in batches]
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = float(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm())
    return bundle_of(model, batches, evidence={"loss": float(mean.detach()), "grad_norm": factor * norm})


@pytest.mark.parametrize(("factor", "reproduced"), [(1.0, True), (2.0, False)])
def test_of_a_finite_step_loss_and_norm_are_compared(factor: float, reproduced: bool) -> None:
    bundle = spike_of(Model(offset=1.0), [torch.randn(3, 4) for _ in range(2)], factor)
    result = replay(bundle, build_model(Model, bundle, {"offset": 1.0}))
    assert result.reproduced is reproduced
    assert result.found is None
    recorded, now = result.numbers["grad_norm"]
    assert recorded == pytest.approx(factor * now, rel=1e-5)
    recorded, now = result.numbers["loss"]
    assert recorded == pytest.approx(now, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "inner", "stored"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_the_step_runs_in_the_recorded_precision(precision: str, inner: torch.dtype, stored: torch.dtype) -> None:
    model = Model().to(stored)
    bundle = bundle_of(model, [torch.zeros(2, 4, dtype=stored)], precision=precision)
    rebuilt = build_model(Model, bundle)
    dtypes: set[torch.dtype] = set()
    rebuilt.net.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    replay(bundle, rebuilt)
    assert dtypes == {inner}
    assert rebuilt.net.weight.dtype == stored


def test_a_precision_that_is_not_known_is_refused() -> None:
    bundle = bundle_of(Model(), [torch.zeros(2, 4)], precision="transformer-engine")
    with pytest.raises(ReplayError, match="'transformer-engine', which can't be replayed"):
        build_model(Model, bundle)


def test_layers_that_configure_model_makes_are_there() -> None:
    class Late(Model):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            self.net = nn.Linear(4, 4)

    model = Model()
    bundle = bundle_of(model, [zeros(model)])
    assert replay(bundle, build_model(Late, bundle)).reproduced


def test_a_plain_module_with_a_training_step_will_do() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def training_step(self, batch: Any) -> Any:
            return self.net(batch).abs().log().mean()

    model = Model()
    bundle = bundle_of(model, [zeros(model)])
    assert replay(bundle, build_model(Plain, bundle)).reproduced


def test_weights_that_do_not_fit_are_an_error() -> None:
    bundle = bundle_of(Model(width=6), [torch.zeros(2, 6)])
    with pytest.raises(
        ReplayError, match=r"do not fit the model: (.|\n)*size mismatch for net.weight(.|\n)*--model-args"
    ):
        build_model(Model, bundle)


def test_arguments_that_are_missing_are_named() -> None:
    class Needs(Model):
        def __init__(self, width: int, depth: int, *, name: str) -> None:
            super().__init__(width)

    bundle = bundle_of(Model(), [torch.zeros(2, 4)], hyper_parameters={"width": 4})
    with pytest.raises(ReplayError, match=r"needs depth, name, and the bundle does not tell.*--model-args"):
        build_model(Needs, bundle)
    assert build_model(Needs, bundle, {"width": 4, "depth": 1, "name": "x"}).net.in_features == 4


def test_a_factory_that_fails_or_gives_something_else_is_an_error() -> None:
    bundle = bundle_of(Model(), [torch.zeros(2, 4)])
    with pytest.raises(ReplayError, match=r"failed with TypeError: .*unexpected"):
        build_model(Model, bundle, {"unexpected": 1})
    with pytest.raises(ReplayError, match="a module with a training_step, got a Linear"):
        build_model(lambda: nn.Linear(1, 1), bundle)


@pytest.mark.parametrize("missing", ["batches", "weights"])
def test_a_bundle_without_tensors_is_refused(missing: str) -> None:
    bundle = bundle_of(Model(), [torch.zeros(2, 4)])
    bundle = Bundle(**{**vars(bundle), missing: None})
    with pytest.raises(ReplayError, match=r"save_batch=True"):
        replay(bundle, build_model(Model, bundle))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package.Model", "of the form package.module:Class"),
        ("no_such_package:Model", "No module named 'no_such_package'"),
        ("torch.nn:NoSuchLayer", "NoSuchLayer"),
        ("torch.nn:__name__", "must be a class or a function"),
        ("__main__:Model", "of train.py, --model train:Model"),
    ],
)
def test_names_that_can_not_be_imported_are_refused(name: str, message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        import_factory(name)


def test_nested_names_are_imported() -> None:
    assert import_factory("torch:nn.Linear") is nn.Linear
