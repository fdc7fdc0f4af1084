"""Every kind of fault does what it says and nothing else, and comes again where it should."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW

from stability_callbacks import FaultInjector, GradientClipping, GradientMonitor, StepGuard
from stability_callbacks.clipping import NormClip
from stability_callbacks.engine import OptimizerStep, StabilityCallback
from stability_callbacks.faults import Fault, Injection
from tests.models import (
    MODELS,
    MemoryLogger,
    NormNet,
    ResumableLoader,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    sgd,
    training_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:FaultInjector puts faults into this training on purpose")

ROOT = Path(__file__).parents[2]
TARGETS = ["activation", "buffer", "gradient", "input", "learning_rate", "loss", "optimizer_state", "weight"]
OF_THE_STEP_ONLY = ["activation", "gradient", "input", "loss"]
NAN = float("nan")


def fault(target: Any, value: Any = "nan", **arguments: Any) -> Fault:
    if target == "learning_rate" and value == "nan":
        value = 100.0
    return Fault(target, value, **arguments)


class Witness(StabilityCallback):
    """Writes down everything that a fault may hit, as the callbacks of the package and the optimizer see it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def on_micro_batch(self, batch: Any, batch_idx: int, first: bool) -> None:
        state = training_state(self.training.module, self.training.trainer)
        parameters = {name for name, _ in self.training.module.named_parameters()}
        micro_batch = {
            "input": copy.deepcopy(batch),
            "weight": {name: value for name, value in state["model"].items() if name in parameters},
            "buffer": {name: value for name, value in state["model"].items() if name not in parameters},
            "optimizer_state": copy.deepcopy([optimizer["state"] for optimizer in state["optimizers"]]),
        }
        if first:
            self.steps.append({**micro_batch, "loss": [], "gradient": [], "learning_rate": []})
        else:
            self.steps[-1]["later input"] = micro_batch["input"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self.steps[-1]["loss"].append(loss.detach().clone())

    def observe(self, step: OptimizerStep) -> None:
        gradients = {name: parameter.grad.clone() for name, parameter in step.parameters if parameter.grad is not None}
        self.steps[-1]["gradient"].append(gradients)

    def before_update(self, step: OptimizerStep) -> None:
        self.steps[-1]["learning_rate"].append(step.rates.effective())


def run(
    faults: Any = (),
    callbacks: Any = (),
    batches: Any = None,
    build: Any = NormNet,
    place: int = 0,
    **arguments: Any,
) -> dict[str, Any]:
    """Train with faults; the injector stands at a place in the list of callbacks."""
    pl.seed_everything(0, verbose=False)
    model, witness = build(), Witness()
    injector = FaultInjector(faults) if faults else None
    all_callbacks = [*callbacks, witness]
    if injector is not None:
        all_callbacks.insert(place, injector)
    trainer = fit(model, make_batches(6) if batches is None else batches, all_callbacks, **arguments)
    return {
        "state": training_state(model, trainer),
        "injected": injector.injected if injector else [],
        "steps": witness.steps,
        "random": torch.get_rng_state(),
        "injector": injector,
        "model": model,
        "trainer": trainer,
    }


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{name}.{key}").items()}
    return {name: tree}


def tensors(tree: Any) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in flat(tree).items() if isinstance(leaf, Tensor)}


def changed(one: Any, other: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors that differ in a bit."""
    left, right = flat(one), flat(other)
    assert left.keys() == right.keys()
    found = {}
    for name, tensor in left.items():
        try:
            assert_same_bits(tensor, right[name])
        except AssertionError:
            found[name] = (tensor, right[name])
    return found


# ---- what a fault does


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", 8.0])
@pytest.mark.parametrize("target", ["buffer", "gradient", "input", "optimizer_state", "weight"])
def test_one_element_or_one_tensor_changes_and_nothing_else(target: str, value: Any) -> None:
    clean, faulty = run(), run(fault(target, value, steps=3))
    for before in range(3):
        assert_same_bits(faulty["steps"][before], clean["steps"][before])
    one, other = faulty["steps"][3], clean["steps"][3]
    ((_, (tensor, was)),) = changed(one[target], other[target]).items()
    if isinstance(value, str):
        differs = (tensor != was) | tensor.isnan()
        assert int(differs.sum()) == 1
        assert repr(float(tensor[differs])) == value
    else:
        assert_same_bits(tensor, was * value)
    follow = {"loss", "gradient"} if target != "gradient" else set()
    for untouched in one.keys() - {target} - follow:
        assert_same_bits(one[untouched], other[untouched], untouched)
    ((step, kind, put, where, rank),) = faulty["injected"]
    assert (step, kind, put, rank) == (3, target, value, None)
    assert where


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", 8.0])
def test_the_loss_is_multiplied_and_so_is_every_gradient(value: Any) -> None:
    clean, faulty = run(), run(Fault("loss", value, steps=3))
    one, other = faulty["steps"][3], clean["steps"][3]
    assert_same_bits(one["loss"][0], other["loss"][0] * float(value))
    for name, gradient in one["gradient"][0].items():
        if isinstance(value, str):
            assert not gradient.isfinite().any(), name
        else:
            assert_same_bits(gradient, other["gradient"][0][name] * value)
    for untouched in one.keys() - {"loss", "gradient"}:
        assert_same_bits(one[untouched], other[untouched], untouched)
    assert faulty["injected"] == [Injection(3, "loss", value, "", None)]


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("scheduler", [False, True])
def test_the_learning_rate_surges_for_the_step(scheduler: bool, tensor_rate: bool) -> None:
    class Scheduled(NormNet):
        def configure_optimizers(self) -> Any:
            rate: Any = torch.tensor(0.05) if tensor_rate else 0.05
            optimizer = SGD(self.parameters(), lr=rate, momentum=0.9)
            if not scheduler:
                return optimizer
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    clean, faulty = run(build=Scheduled), run(Fault("learning_rate", 8.0, steps=[2, 3]), build=Scheduled)
    for step, (one, other) in enumerate(zip(faulty["steps"], clean["steps"], strict=True)):
        surge = 8.0 if step in (2, 3) else 1.0
        assert float(one["learning_rate"][0][0]) == float(other["learning_rate"][0][0]) * surge
        for untouched in one.keys() - {"learning_rate"} if step <= 2 else ():
            assert_same_bits(one[untouched], other[untouched], untouched)
    assert changed(faulty["steps"][3]["weight"], clean["steps"][3]["weight"])
    assert faulty["injected"] == [Injection(step, "learning_rate", 8.0, "SGD") for step in (2, 3)]
    groups = [each["trainer"].optimizers[0].param_groups for each in (faulty, clean)]
    assert groups[0][0]["lr"] == groups[1][0]["lr"]


def test_a_surge_is_plain_sgd_with_another_rate_in_that_step() -> None:
    class Surging(NormNet):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] = 0.5 if self.global_step == 2 else 0.05

    assert_same_bits(run(Fault("learning_rate", 10.0, steps=2))["state"]["model"], run(build=Surging)["state"]["model"])


@pytest.mark.parametrize("value", ["nan", "inf", 8.0])
def test_the_output_of_a_module_changes(value: Any) -> None:
    outputs: list[list[Tensor]] = []

    class Watched(NormNet):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            outputs[-1].append(self.net[0](x))
            return nn.functional.cross_entropy(self.net[1:](outputs[-1][-1]), y)

    for faults in ((), Fault("activation", value, steps=3, where=r"net\.0")):
        outputs.append([])
        result = run(faults, build=Watched)
    clean, faulty = outputs
    for before in range(3):
        assert_same_bits(faulty[before], clean[before])
    if isinstance(value, str):
        assert int(((faulty[3] != clean[3]) | faulty[3].isnan()).sum()) == 1
    else:
        assert_same_bits(faulty[3], clean[3] * value)
    assert result["injected"] == [Injection(3, "activation", value, "net.0")]
    assert not any(module._forward_hooks for module in result["model"].modules())


def test_hooks_are_there_only_while_they_are_needed() -> None:
    class Watched(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before.append(sum(len(module._forward_hooks) for module in self.modules()))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.loss(batch).isfinite()

    before: list[int] = []
    faults = [Fault("activation", steps=[1, 4], where="0"), Fault("activation", steps=2, where="unused")]

    def build() -> Watched:
        model = Watched()
        model.unused = nn.Linear(1, 1)
        return model

    pl.seed_everything(0, verbose=False)
    injector, model = FaultInjector(faults), build()
    trainer = pl.Trainer(
        callbacks=[injector, StepGuard()],
        max_epochs=1,
        val_check_interval=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="found nothing to hit in step 2"):
        trainer.fit(model, ResumableLoader(make_batches(6)), ResumableLoader(make_batches(1)))
    assert before == [0, 1, 1, 0, 1, 0]
    assert [injection.step for injection in injector.injected] == [1, 4]


def test_faults_that_stay_and_faults_that_go() -> None:
    for target in TARGETS:
        result = run(fault(target, steps=3), [StepGuard()], batches=make_batches(6))
        skipped = sum(
            callback.skipped_steps for callback in result["trainer"].callbacks if isinstance(callback, StepGuard)
        )
        expected = {"weight": 3, "optimizer_state": 2, "buffer": 0, "learning_rate": 0}.get(target, 1)
        assert skipped == expected, target
        finite = {name: bool(value.isfinite().all()) for name, value in tensors(result["state"]).items()}
        assert all(finite.values()) == (target not in ("weight", "optimizer_state", "buffer")), target


# ---- what it leaves alone


ARGUMENTS: dict[str, Any] = {
    "fp32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [fp16()]},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "clipping": lambda: {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("build", [*MODELS.values(), TwoOptimizers])
def test_where_no_fault_is_due_training_is_bit_identical(build: Any, arguments: str) -> None:
    if (build is TwoOptimizers and arguments in ("accumulation", "clipping")) or (
        build is MODELS["sparse"] and arguments == "clipping"
    ):
        pytest.skip("neither Lightning nor torch can do that")
    faults = [fault(target, steps=1000) for target in TARGETS if target != "buffer" or build is not MODELS["tied"]]
    if build is MODELS["sparse"]:
        faults = [each for each in faults if each.target != "buffer"]
    clean = run(build=build, **ARGUMENTS[arguments]())
    with_injector = run(faults, build=build, **ARGUMENTS[arguments]())
    assert with_injector["injected"] == []
    for what in ("state", "steps", "random"):
        assert_same_bits(with_injector[what], clean[what], what)


def test_draws_leave_the_global_random_state_alone() -> None:
    faults = [fault(target, probability=0.5) for target in ("input", "gradient", "activation", "weight")]
    assert_same_bits(run(faults)["random"], run()["random"])


@pytest.mark.parametrize("value", ["nan", 1e4])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("place", [0, 1])
def test_batches_are_given_back_as_they_were(place: int, accumulate: int, value: Any) -> None:
    batches = make_batches(6)
    before = copy.deepcopy(batches)
    seen: list[bool] = []

    class Reader(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(bool((batches[0][0] != before[0][0]).any()))

    faults = [Fault("input", value, steps=0), Fault("input", 3.0, steps=0), Fault("input", probability=0.5)]
    result = run(faults, [StepGuard()], batches, place=place, accumulate_grad_batches=accumulate, max_epochs=2)
    assert len(result["injected"]) > 3
    assert_same_bits(batches, before)
    run(faults[0], [Reader()], batches, place=1, accumulate_grad_batches=accumulate)
    assert seen[: accumulate + 1] == [True] * accumulate + [False][: accumulate < 6]


@pytest.mark.parametrize("hook", ["training_step", "backward", "optimizer_step"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_batches_are_given_back_after_an_exception(error: type[BaseException], hook: str) -> None:
    batches = make_batches(3)
    before = copy.deepcopy(batches)

    class Broken(NormNet):
        def fail(self, *args: Any, **kwargs: Any) -> Any:
            assert not batches[0][0].isfinite().all()
            raise error("on purpose")

    setattr(Broken, hook, Broken.fail)
    with pytest.raises((error, SystemExit)):
        run([Fault("input", steps=0), Fault("activation", steps=0)], [StepGuard()], batches, build=Broken)
    assert_same_bits(batches, before)


def test_a_factor_in_the_input_is_what_a_scaled_batch_is() -> None:
    batches = make_batches(6)
    scaled = [(x * 1e4 if index == 2 else x, y) for index, (x, y) in enumerate(batches)]
    assert_same_bits(run(Fault("input", 1e4, steps=2), batches=batches)["state"], run(batches=scaled)["state"])


def test_one_tensor_of_a_nested_batch_is_chosen_by_name() -> None:
    class Nested(NormNet):
        def loss(self, batch: Any) -> Tensor:
            seen.append({"x": batch["data"][0].clone(), "mask": batch["mask"].clone()})
            return super().loss(batch["data"])

    seen: list[dict[str, Tensor]] = []
    batches = [{"data": batch, "mask": torch.ones(2)} for batch in make_batches(3)]
    result = run(Fault("input", "inf", steps=1, where="mask"), batches=batches, build=Nested)
    assert [bool(each["mask"].isinf().any()) for each in seen] == [False, True, False]
    assert all(each["x"].isfinite().all() for each in seen)
    assert result["injected"][0].where == "batch['mask']"


# ---- when it comes, and again


EVERYTHING = [
    *(fault(target, 1.5, probability=0.4) for target in TARGETS),
    *(Fault(target, "inf", steps=[3, 6], seed=2) for target in OF_THE_STEP_ONLY),
]


@pytest.mark.filterwarnings("ignore:FaultInjector found nothing to hit")
@pytest.mark.parametrize("arguments", ["fp32", "fp16", "accumulation"])
def test_the_same_again_in_any_order_of_the_lists(arguments: str) -> None:
    def others() -> list[Any]:
        return [StepGuard(), GradientClipping(NormClip(0.5)), GradientMonitor()]

    results = [
        run(faults, order, make_batches(12), place=place, **ARGUMENTS[arguments]())
        for faults, order, place in [
            (EVERYTHING, others(), 0),
            (EVERYTHING, others(), 0),
            (EVERYTHING[::-1], others()[::-1], 2),
            (EVERYTHING[4:] + EVERYTHING[:4], others(), 3),
        ]
    ]
    assert len(results[0]["injected"]) > 10
    for result in results[1:]:
        assert result["injected"] == results[0]["injected"]
        assert_same_bits(result["state"], results[0]["state"])
        assert_same_bits(result["steps"], results[0]["steps"])
    other_seed = run(
        [Fault(each.target, each.value, probability=each.probability, seed=9) for each in EVERYTHING[:8]],
        others(),
        make_batches(12),
    )
    assert other_seed["injected"] != results[0]["injected"]


def test_injected_are_the_faults_that_were_due() -> None:
    faults = [Fault(target, 1.01, probability=0.3) for target in ("input", "weight", "loss", "gradient", "buffer")]
    result = run(faults, batches=make_batches(20), max_epochs=3)
    counted = {each.target: [i.step for i in result["injected"] if i.target == each.target] for each in faults}
    assert counted == {each.target: [step for step in range(60) if each.is_due(step)] for each in faults}


class Interruption(Callback):
    """Saves a checkpoint at the end of a batch and stops."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path = path
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:FaultInjector found nothing to hit")
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("build", [NormNet, TwoOptimizers])
def test_resumed_equals_uninterrupted(build: Any, place: str, tmp_path: Path) -> None:
    faults = [each for each in EVERYTHING if each.target != "activation" or build is NormNet]

    def train(*extra: Callback, ckpt_path: Any = None) -> tuple[Any, FaultInjector]:
        pl.seed_everything(0, verbose=False)
        model, injector = build(), FaultInjector(faults)
        callbacks = [injector, StepGuard(), *extra]
        trainer = fit(
            model,
            ResumableLoader(make_batches(10)),
            callbacks if place == "last" else callbacks[::-1],
            ckpt_path,
            max_epochs=2,
        )
        return training_state(model, trainer), injector

    whole, injector = train()
    path = tmp_path / "interrupted.ckpt"
    _, stopped = train(Interruption(path, 7))
    resumed, after = train(ckpt_path=path)
    assert 0 < len(stopped.injected) < len(injector.injected)
    assert after.injected == injector.injected
    assert_same_bits(resumed, whole)


def test_a_checkpoint_without_the_injector_counts_the_steps_too(tmp_path: Path) -> None:
    path = tmp_path / "interrupted.ckpt"
    fit(NormNet(), make_batches(6), [Interruption(path, 4)])
    injector = FaultInjector(Fault("input", 2.0, steps=[1, 5]))
    fit(NormNet(), make_batches(6), [injector], path)
    assert [injection.step for injection in injector.injected] == [5]


def test_a_second_fit_begins_anew() -> None:
    injector = FaultInjector(Fault("input", 2.0, steps=[1, 4]))
    fit(NormNet(), make_batches(6), [injector])
    fit(NormNet(), make_batches(3), [injector])
    assert [injection.step for injection in injector.injected] == [1]


# ---- accumulation, loss scaling, manual optimization


def test_under_accumulation_the_first_micro_batch_is_hit_but_gradients_in_the_last() -> None:
    clean = run(accumulate_grad_batches=3)
    for target in ("input", "loss", "gradient"):
        faulty = run(Fault(target, 4.0, steps=1), accumulate_grad_batches=3)
        one, other = faulty["steps"][1], clean["steps"][1]
        assert len(faulty["steps"]) == 2
        assert bool(changed(one["input"], other["input"])) == (target == "input")
        assert not changed(one["later input"], other["later input"])
        losses = [float(a) / float(b) for a, b in zip(one["loss"], other["loss"], strict=True)]
        assert losses[1:] == [1.0, 1.0]
        assert {"input": losses[0] != 1, "loss": losses[0] == 4, "gradient": losses[0] == 1}[target]
        if target == "gradient":
            ((_, (tensor, was)),) = changed(one["gradient"], other["gradient"]).items()
            assert_same_bits(tensor, was * 4)
        assert [injection.step for injection in faulty["injected"]] == [1]


def test_the_last_window_of_an_epoch_may_be_short() -> None:
    result = run(
        Fault("gradient", 2.0, steps=range(10)), batches=make_batches(5), accumulate_grad_batches=3, max_epochs=2
    )
    assert [injection.step for injection in result["injected"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("target", OF_THE_STEP_ONLY)
def test_the_loss_scaler_sees_the_fault(target: str, guard: bool, fused: bool) -> None:
    build = partial(NormNet, partial(SGD, lr=0.05, momentum=0.9, fused=fused))
    precision = fp16()
    result = run(fault(target, steps=3), [StepGuard()] * guard, build=build, plugins=[precision])
    assert precision.scaler.get_scale() == 512
    assert all(parameter.isfinite().all() for parameter in result["model"].parameters())
    assert len(result["steps"]) == 6


def test_under_a_scaler_the_loss_is_multiplied_all_the_same() -> None:
    clean, faulty = run(plugins=[fp16()]), run(Fault("loss", 4.0, steps=3), plugins=[fp16()])
    for name, gradient in faulty["steps"][3]["gradient"][0].items():
        assert_same_bits(gradient, clean["steps"][3]["gradient"][0][name] * 4)


def test_in_manual_optimization_steps_are_those_of_each_optimizer() -> None:
    clean = run(build=TwoOptimizers)
    faulty = run(Fault("learning_rate", 8.0, steps=2), build=TwoOptimizers)
    rates = [
        [[group[0] for group in each["steps"][step]["learning_rate"]] for step in range(6)] for each in (clean, faulty)
    ]
    assert rates[0] == [[0.1, 0.2]] * 6
    assert rates[1] == [[0.1, 0.2]] * 2 + [[0.8, 1.6]] + [[0.1, 0.2]] * 3
    assert faulty["injected"] == [Injection(2, "learning_rate", 8.0, label) for label in ("SGD", "SGD-1")]


@pytest.mark.parametrize("where", ["one", "two"])
def test_in_manual_optimization_a_gradient_is_hit_after_it_was_written(where: str) -> None:
    clean, faulty = run(build=TwoOptimizers), run(Fault("gradient", 4.0, steps=2, where=where), build=TwoOptimizers)
    for step in range(2):
        assert_same_bits(faulty["steps"][step], clean["steps"][step])
    ((place, (tensor, was)),) = changed(faulty["steps"][2]["gradient"], clean["steps"][2]["gradient"]).items()
    assert f".{where}." in place
    assert_same_bits(tensor, was * 4)
    (injection,) = faulty["injected"]
    assert (injection.step, injection.where) == (2, place.split(".", 2)[2])


def test_in_manual_optimization_the_first_loss_of_the_batch_is_hit() -> None:
    clean, faulty = run(build=TwoOptimizers), run(Fault("loss", 4.0, steps=2), build=TwoOptimizers)
    one, other = faulty["steps"][2]["loss"], clean["steps"][2]["loss"]
    assert [float(a) / float(b) for a, b in zip(one, other, strict=True)] == [4.0, 1.0]
    assert len(faulty["injected"]) == 1


@pytest.mark.parametrize("target", ["input", "weight", "buffer", "optimizer_state"])
def test_in_manual_optimization_batches_count_for_what_is_hit_before_the_forward(target: str) -> None:
    where = None if target in ("buffer", "input") else "two" if target == "weight" else "one"
    result = run(Fault(target, 1.5, steps=[1, 4], where=where), build=TwoOptimizers)
    assert [injection.step for injection in result["injected"]] == [1, 4]


# ---- with the guard


@pytest.mark.parametrize("target", OF_THE_STEP_ONLY)
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "optimizer",
    [sgd, partial(SGD, lr=0.05, momentum=0.9, fused=True), partial(AdamW, lr=0.01, fused=True)],
    ids=["sgd", "fused sgd", "fused adamw"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_faulty_step_that_is_skipped_never_was(target: str, value: Any, optimizer: Any, accumulate: int) -> None:
    good = make_batches(6)
    extra = make_batches(accumulate, seed=7)
    build = partial(NormNet, optimizer)
    guard = StepGuard()
    faulty = run(
        Fault(target, value, steps=[0, 2]),
        [guard],
        [*extra, *good[:accumulate], *extra, *good[accumulate:]],
        build,
        accumulate_grad_batches=accumulate,
    )
    assert len(faulty["injected"]) == 2
    if guard.skipped_steps != 2:  # an infinity may be harmless: a ReLU stops -inf, softmax a large class
        pytest.fail(f"{guard.skipped_steps} steps were skipped: {faulty['injected']}")
    clean = run((), [StepGuard()], good, build, accumulate_grad_batches=accumulate)
    assert_same_bits(faulty["state"], clean["state"])


# ---- what is said


def test_says_at_the_start_that_faults_come() -> None:
    with pytest.warns(
        UserWarning, match=r"FaultInjector puts faults into this training on purpose: Fault\(target='loss'"
    ):
        run(Fault("loss", 2.0, steps=1000))


def test_counts_in_a_metric_and_announces_the_first_few(caplog: pytest.LogCaptureFixture) -> None:
    logger = MemoryLogger()
    caplog.set_level(logging.WARNING, "stability_callbacks")
    run(Fault("loss", 1.01, steps=range(2, 105)), batches=make_batches(110), logger=logger)
    values = logger.values("stability/injected_faults")
    assert [values[step] for step in (0, 1, 2, 3, 50, 109)] == [0, 0, 1, 2, 49, 103]
    lines = [record.getMessage() for record in caplog.records if "Injected a fault" in record.getMessage()]
    assert lines[0] == "Injected a fault: factor 1.01 on loss in step 2. 1 injected so far."
    assert [int(re.findall(r"(\d+) injected", line)[0]) for line in lines] == [*range(1, 11), 100]


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        (Fault("optimizer_state", steps=0), "none has any before its first step"),
        (Fault("activation", steps=0, where="unused"), "no module that it may hit gave"),
        (Fault("gradient", steps=0, where="unused"), "no parameter that it may hit got a gradient"),
        (Fault("buffer", steps=0, where="num_batches"), "no buffer that it may hit holds floating-point numbers"),
    ],
    ids=lambda value: getattr(value, "target", ""),
)
def test_a_fault_that_finds_nothing_is_dropped_with_a_warning(missing: Fault, why: str) -> None:
    def build() -> NormNet:
        model = NormNet()
        model.unused = nn.Linear(1, 1)
        return model

    with pytest.warns(UserWarning, match=why) as warned:
        result = run(missing, build=build)
    assert len([1 for warning in warned if "found nothing" in str(warning.message)]) == 1
    assert result["injected"] == []
    assert_same_bits(result["state"], run(build=build)["state"])


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_step_without_a_loss_loses_its_faults() -> None:
    class Absent(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="there was no backward pass"):
        result = run(Fault("loss", 2.0, steps=[2, 3]), build=Absent)
    assert [injection.step for injection in result["injected"]] == [3]


def test_integer_batches_are_refused_in_the_first_step() -> None:
    batches = [(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))] * 3
    with pytest.raises(
        MisconfigurationException, match=r"needs a floating-point tensor, .*'batch\[0\]': 'torch.int64'"
    ):
        run(Fault("input", steps=2), batches=batches)
    with pytest.raises(MisconfigurationException, match="whose name fits `where`"):
        run(Fault("input", steps=2, where="image"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Fault("weight", steps=0, where="decoder"), r"fits nothing in the model; there are: net\.0\.weight"),
        (Fault("gradient", steps=0, where="decoder"), r"there are: net\.0\.weight"),
        (Fault("activation", steps=0, where="decoder"), r"there are: net, net\.0"),
        (Fault("buffer", steps=0, where="decoder"), r"there are: net\.1\.running_mean"),
        (Fault("weight", steps=0, rank=1), "`rank` must be < 1, the number of processes, got rank=1"),
    ],
)
def test_what_the_model_does_not_have_is_refused_at_train_start(wrong: Fault, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run(wrong)


def test_wrong_arguments() -> None:
    for wrong in ("nan", 3, None, {"input": 3}):
        with pytest.raises(TypeError, match="`faults` must be a fault, such as"):
            FaultInjector(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`faults` must be"):
        FaultInjector([])
    with pytest.raises(TypeError, match=r"`faults\[1\]` must be a fault"):
        FaultInjector([Fault("input", steps=0), "input"])  # type: ignore[list-item]


# ---- as an object


def test_copies_and_state_key() -> None:
    injector = FaultInjector([Fault("input", steps=range(3)), Fault("loss", 4.0, probability=0.5)])
    for copied in (copy.deepcopy(injector), pickle.loads(pickle.dumps(injector))):
        assert copied.state_key == injector.state_key
        assert repr(copied.faults) == repr(injector.faults)
    assert "0x" not in injector.state_key
    assert FaultInjector(Fault("input", steps=1)).state_key != injector.state_key


def test_two_injectors_work_beside_each_other() -> None:
    one, two = Fault("input", 2.0, steps=[1, 3]), Fault("gradient", 2.0, steps=[3, 4])
    together = run([one, two])
    for callbacks in itertools.permutations([FaultInjector(one), FaultInjector(two)]):
        apart = run((), callbacks)
        assert_same_bits(apart["state"], together["state"])
    assert sorted(i for each in callbacks for i in each.injected) == sorted(together["injected"])


def test_is_configured_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=FaultInjector)
    config = parser.parse_string(
        """
        callback:
          class_path: stability_callbacks.FaultInjector
          init_args:
            faults:
              - class_path: stability_callbacks.faults.Fault
                init_args: {target: input, value: nan, steps: [1, 2], where: image}
              - class_path: stability_callbacks.faults.Fault
                init_args: {target: learning_rate, value: 1e2, probability: 0.1, seed: 3}
              - class_path: stability_callbacks.faults.Fault
                init_args: {target: weight, value: -inf, steps: 7, rank: 0}
        """
    )
    expected = [
        Fault("input", "nan", steps=[1, 2], where="image"),
        Fault("learning_rate", 100.0, probability=0.1, seed=3),
        Fault("weight", "-inf", steps=7, rank=0),
    ]
    assert repr(parser.instantiate(config).callback.faults) == repr(expected)


class Checkpointed(NormNet):
    """Its batch norm is wrapped, which puts a segment into its name."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = checkpoint_wrapper(self.net[1])


def test_wrapped_modules_go_by_their_plain_names() -> None:
    injector = FaultInjector(Fault("buffer", "nan", steps=1, where=r"^net\.1\.running_var$"))
    fit(Checkpointed(), make_batches(3), [injector, StepGuard()])
    assert [injection.where for injection in injector.injected] == ["net.1.running_var"]
