"""Clipping inside training: equal to torch's own, counted, logged, and one copy of the rule for each optimizer."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from stability_callbacks import GradientClipping, GradientMonitor, StepGuard
from stability_callbacks.clipping import AGC, ClipResult, NormClip, PerGroup, ValueClip
from stability_callbacks.detection import Detector, NonFinite, StepEvidence
from stability_callbacks.schedules import Scaled, WarmupConstant, WarmupCosine, WarmupLinear
from tests.models import (
    MODELS,
    AverageClip,
    MemoryLogger,
    NormNet,
    SparseNet,
    TinyModel,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    poison,
    seeded,
    sgd,
    state_after,
)

NAN, INF = float("nan"), float("inf")


def run(make: Any, batches: Any, callbacks: Any = (), **arguments: Any) -> Any:
    return state_after(seeded(make), batches, callbacks, **arguments)


# ---- equal to torch's own

WAYS: dict[str, Any] = {
    "plain": dict,
    "accumulation": lambda: {"accumulate_grad_batches": 3},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [fp16()]},
    "fp16_accumulation": lambda: {"plugins": [fp16()], "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("name", ["batch_norm", "tied"])
@pytest.mark.parametrize("way", ["plain", "accumulation"])
@pytest.mark.parametrize("bound", [0.1, 1e6])
def test_norm_clipping_equals_that_of_the_trainer_bit_for_bit(bound: float, way: str, name: str) -> None:
    ours = run(MODELS[name], make_batches(7), [GradientClipping(NormClip(bound))], **WAYS[way]())
    theirs = run(MODELS[name], make_batches(7), gradient_clip_val=bound, **WAYS[way]())
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("arguments", [("norm", 0.1, NormClip(0.1)), ("value", 0.02, ValueClip(0.02))], ids=str)
def test_sparse_gradients_are_clipped_as_dense_ones_are(arguments: Any) -> None:
    """Torch's own can't take sparse ones, so the reference is the same model with a dense embedding."""

    class Dense(SparseNet):
        def __init__(self) -> None:
            super().__init__()
            self.embedding.sparse = False

    kind, bound, rule = arguments
    ours = run(SparseNet, make_batches(5), [GradientClipping(rule)])
    theirs = run(Dense, make_batches(5), gradient_clip_val=bound, gradient_clip_algorithm=kind)
    for name, value in ours["model"].items():
        torch.testing.assert_close(value, theirs["model"][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bound", [0.01, 1e6])
def test_value_clipping_equals_that_of_the_trainer_bit_for_bit(bound: float, way: str) -> None:
    ours = run(NormNet, make_batches(7), [GradientClipping(ValueClip(bound))], **WAYS[way]())
    arguments = {"gradient_clip_val": bound, "gradient_clip_algorithm": "value", **WAYS[way]()}
    assert_same_bits(ours, run(NormNet, make_batches(7), **arguments))


@pytest.mark.parametrize("way", ["bf16", "fp16", "fp16_accumulation"])
def test_norm_clipping_in_mixed_precision_equals_that_of_the_trainer(way: str) -> None:
    ours = run(NormNet, make_batches(7), [GradientClipping(NormClip(0.1))], **WAYS[way]())
    assert_same_bits(ours, run(NormNet, make_batches(7), gradient_clip_val=0.1, **WAYS[way]()))


@pytest.mark.parametrize("rule", [NormClip(0.1), NormClip(0.05, norm_type=INF), ValueClip(0.01)], ids=repr)
def test_fused_optimizers_under_a_loss_scale_get_the_clipping_that_others_get(rule: Any) -> None:
    """``Trainer(gradient_clip_val=...)`` refuses these. The reference is the same optimizer without ``fused``."""
    make = lambda fused: NormNet(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, fused=fused))  # noqa: E731
    states = [
        run(lambda fused=fused: make(fused), make_batches(6), [GradientClipping(rule)], plugins=[fp16()])
        for fused in (True, False)
    ]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(value, states[1]["model"][name], rtol=1e-5, atol=1e-6)


def test_manual_optimization_clips_each_optimizer_for_itself() -> None:
    class ClipsByHand(TwoOptimizers):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, 0.1)

    ours = run(TwoOptimizers, make_batches(5), [GradientClipping(NormClip(0.1))])
    assert_same_bits(ours, run(ClipsByHand, make_batches(5)))


def test_rules_are_applied_in_order() -> None:
    class ClipsByHand(NormNet):
        def configure_gradient_clipping(self, optimizer: Any, **arguments: Any) -> None:
            nn.utils.clip_grad_value_(self.parameters(), 0.05)
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    expected = run(ClipsByHand, make_batches(5))
    assert_same_bits(run(NormNet, make_batches(5), [GradientClipping([ValueClip(0.05), NormClip(0.1)])]), expected)
    other = run(NormNet, make_batches(5), [GradientClipping([NormClip(0.1), ValueClip(0.05)])])
    with pytest.raises(AssertionError):
        assert_same_bits(other, expected)


# ---- non-finite norms


class Keeps(TinyModel):
    """A model that keeps its gradients as the optimizer saw them."""

    def __init__(self) -> None:
        super().__init__(lambda p: KeepsGradients(p, lr=0.0))
        self.net = nn.Linear(4, 3)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class KeepsGradients(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.kept = [[p.grad.clone() for p in group["params"]] for group in self.param_groups]
        return loss


@pytest.mark.parametrize("rule", [NormClip(0.1), ValueClip(0.1), AverageClip()], ids=repr)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_non_finite_norm_leaves_the_gradients_untouched_and_is_counted(value: float, rule: Any) -> None:
    logger, kept = MemoryLogger(), []
    clipping = GradientClipping(rule)
    batches = [*make_batches(2), poison(make_batches(1)[0], value)]
    for callbacks in ([], [clipping]):
        torch.manual_seed(0)
        trainer = fit(Keeps(), batches, callbacks, logger=logger)
        kept.append(trainer.optimizers[0].kept)  # type: ignore[attr-defined]
    assert not all(gradient.isfinite().all() for gradient in kept[0][0])
    assert_same_bits(*kept)
    assert clipping.nonfinite_norms == 1
    assert logger.values("stability/nonfinite_norms") == {0: 0, 1: 0, 2: 1}


# ---- what it logs


def test_coefficient_threshold_and_share_are_logged() -> None:
    class Loud(NormNet):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * 10.0 ** (3 * batch[0][0, 0].sign())

    batches = make_batches(8)
    for index, (x, _) in enumerate(batches):
        x[0, 0] = x[0, 0].abs() * (1 if index in (1, 2, 5) else -1)
    logger = MemoryLogger()
    callbacks = [GradientClipping(NormClip(2.0)), GradientMonitor(histograms=False)]
    fit(Loud(lambda p: torch.optim.SGD(p, lr=1e-3)), batches, callbacks, logger=logger, log_every_n_steps=2)
    norms, coefficients = logger.values("grad_norm/total"), logger.values("stability/clip_coefficient")
    assert list(norms) == list(coefficients) == [1, 3, 5, 7]
    for step, norm in norms.items():
        assert coefficients[step] == pytest.approx(min(1.0, 2.0 / (norm + 1e-6)), rel=1e-6)
    assert {step for step, coefficient in coefficients.items() if coefficient < 1} == {1, 5}
    assert logger.values("stability/clip_threshold") == {1: 2.0, 3: 2.0, 5: 2.0, 7: 2.0}
    assert logger.values("stability/clipped_fraction") == {1: 0.5, 3: 0.5, 5: 0.5, 7: 0.0}
    clipped = logger.values("grad_norm_clipped/total")
    assert clipped[1] == pytest.approx(2.0, rel=1e-5)
    assert clipped[7] == norms[7]


def test_several_rules_log_their_joint_coefficient_and_the_last_threshold() -> None:
    logger = MemoryLogger()
    callbacks = [GradientClipping([ValueClip(0.02), NormClip(0.01)]), GradientMonitor(histograms=False)]
    fit(NormNet(), make_batches(3), callbacks, logger=logger)
    norms, clipped = logger.values("grad_norm/total"), logger.values("grad_norm_clipped/total")
    for step, coefficient in logger.values("stability/clip_coefficient").items():
        assert coefficient == pytest.approx(clipped[step] / norms[step], rel=1e-4)
        assert coefficient < 1
    assert list(logger.values("stability/clip_threshold").values()) == pytest.approx([0.01] * 3)


def test_rules_without_a_threshold_log_none() -> None:
    class Plain(NormClip):
        threshold = None  # type: ignore[assignment]

    logger = MemoryLogger()
    fit(NormNet(), make_batches(2), [GradientClipping(Plain(1.0))], logger=logger)
    assert "stability/clip_coefficient" in logger.names()
    assert "stability/clip_threshold" not in logger.names()


def test_thresholds_that_lie_on_the_device_are_logged() -> None:
    class Device(AverageClip):
        @property
        def threshold(self) -> Any:
            return self.max_norm

    logger = MemoryLogger()
    callbacks = [GradientClipping(Device()), GradientMonitor(histograms=False)]
    fit(NormNet(), make_batches(3), callbacks, logger=logger)
    norms = list(logger.values("grad_norm/total").values())
    expected = [sum(norms[: n + 1]) / (n + 1) for n in range(3)]
    assert list(logger.values("stability/clip_threshold").values()) == pytest.approx(expected, rel=1e-6)


class Third(Detector):
    """Votes against the third step, whose gradients are as finite as any."""

    kind: ClassVar[str] = "third"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, evidence: StepEvidence) -> Tensor:
        self.seen += 1
        return torch.tensor(self.seen == 3)


@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.AdamW(p, fused=True)], ids=["host", "device"])
def test_skipped_steps_have_no_share_in_the_clipped_ones(optimizer: Any) -> None:
    logger, guard = MemoryLogger(), StepGuard([Third(), NonFinite()])
    batches = [*make_batches(5), poison(make_batches(1)[0])]
    fit(NormNet(optimizer), batches, [GradientClipping(NormClip(1e-3)), guard], logger=logger, log_every_n_steps=6)
    assert guard.skipped_steps == 2
    assert logger.values("stability/clipped_fraction") == {5: 1.0}


def test_with_several_optimizers_the_names_end_in_the_optimizer() -> None:
    logger = MemoryLogger()
    fit(TwoOptimizers(), make_batches(2), [GradientClipping(NormClip(0.01))], logger=logger)
    names = ("clip_coefficient", "clip_threshold", "clipped_fraction")
    expected = {f"stability/{name}/{label}" for name in names for label in ("SGD", "SGD-1")}
    assert logger.names() == {*expected, "stability/nonfinite_norms"}


# ---- one copy of the rule for each optimizer


def test_every_optimizer_has_its_own_copy_of_the_rule() -> None:
    rule = AverageClip()
    clipping = GradientClipping(rule)
    logger = MemoryLogger()
    fit(TwoOptimizers(), make_batches(4), [clipping, GradientMonitor(histograms=False)], logger=logger)
    one, two = (states[0] for states in clipping.state_dict()["rules"])
    assert one["count"] == two["count"] == 4
    for state, label in ((one, "SGD"), (two, "SGD-1")):
        assert float(state["sum"]) == pytest.approx(sum(logger.values(f"grad_norm/total/{label}").values()), rel=1e-6)
    assert rule.count == 0


def test_a_new_trainer_starts_from_the_rule_as_it_was_given() -> None:
    clipping = GradientClipping(AverageClip())
    first = run(NormNet, make_batches(4), [clipping])
    state = clipping.state_dict()
    assert_same_bits(run(NormNet, make_batches(4), [clipping]), first)
    assert_same_bits(clipping.state_dict(), state)


def test_state_survives_a_round_trip_as_plain_data(tmp_path: Any) -> None:
    clipping = GradientClipping([ValueClip(0.5), AverageClip()])
    fit(TwoOptimizers(), [*make_batches(4), poison(make_batches(1)[0])], [clipping], log_every_n_steps=50)
    torch.save(clipping.state_dict(), tmp_path / "clipping.pt")
    state = torch.load(tmp_path / "clipping.pt", weights_only=True)
    other = GradientClipping([ValueClip(0.5), AverageClip()])
    other.load_state_dict(state)
    assert_same_bits(other.state_dict(), clipping.state_dict())
    assert other.nonfinite_norms == 2
    assert other.state_key == clipping.state_key != GradientClipping(NormClip()).state_key


# ---- thresholds that follow a schedule

DECAY = Scaled(WarmupCosine(warmup=0, end=0.1), 0.01)  # below every norm


def decay(steps: int, total: int) -> list[float]:
    return [DECAY(step, total) for step in range(steps)]


def logged(logger: MemoryLogger, name: str = "stability/clip_threshold") -> list[float]:
    return list(logger.values(name).values())


SCHEDULED = {
    "alone": lambda: NormClip(DECAY),
    "in a list": lambda: [ValueClip(10.0), NormClip(DECAY)],
    "in a group": lambda: PerGroup({"net.0": NormClip(DECAY), ".*": None}),
}


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_threshold_falls_over_the_whole_of_training(accumulate: int, name: str) -> None:
    """The reference clips by hand, by torch's own function."""

    class ClipsByHand(NormNet):
        def configure_gradient_clipping(self, optimizer: Any, **arguments: Any) -> None:
            nn.utils.clip_grad_value_(self.parameters(), 10.0)
            clipped = self.net[0] if name == "in a group" else self
            nn.utils.clip_grad_norm_(clipped.parameters(), DECAY(self.trainer.global_step, 6))

    arguments = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    ours = run(NormNet, make_batches(3 * accumulate), [GradientClipping(SCHEDULED[name]())], **arguments)
    assert_same_bits(ours, run(ClipsByHand, make_batches(3 * accumulate), **arguments))


@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.AdamW(p, fused=True)], ids=["host", "device"])
@pytest.mark.parametrize("scaled", [False, True], ids=["32", "fp16"])
def test_skipped_steps_are_steps_of_the_schedule(scaled: bool, optimizer: Any) -> None:
    """Whether the host knows of the skip, so that no rule is asked, or only the device does, or a loss scaler does."""
    logger, guard, batches = MemoryLogger(), StepGuard([Third(), NonFinite()]), make_batches(8)
    batches[5] = poison(batches[5])
    arguments = {"plugins": [fp16()]} if scaled else {}
    clipping = GradientClipping(NormClip(DECAY))
    fit(NormNet(optimizer), batches, [clipping, guard], logger=logger, **arguments)
    assert guard.skipped_steps == 2
    thresholds = logger.values("stability/clip_threshold")
    assert thresholds == {step: pytest.approx(decay(8, 8)[step], rel=1e-6) for step in thresholds}
    assert {0, 1, 3, 4, 6, 7} <= set(thresholds)
    assert clipping.state_dict()["attempted_steps"] == [8]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_gradients_are_steps_of_the_schedule() -> None:
    class ReturnsNone(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    logger = MemoryLogger()
    fit(ReturnsNone(), make_batches(4), [GradientClipping(NormClip(DECAY))], logger=logger)
    assert logged(logger) == pytest.approx([decay(4, 4)[step] for step in (0, 2, 3)], rel=1e-6)


def test_every_optimizer_has_a_clock_of_its_own() -> None:
    logger = MemoryLogger()
    fit(TwoOptimizers(), make_batches(4), [GradientClipping(NormClip(DECAY))], logger=logger)
    for label in ("SGD", "SGD-1"):
        assert logged(logger, f"stability/clip_threshold/{label}") == pytest.approx(decay(4, 4), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("saved_with", [True, False], ids=["with it", "without it"])
def test_the_schedule_goes_on_after_a_resume(saved_with: bool, tmp_path: Any) -> None:
    """Also from a checkpoint that was written without the callback, and with another total."""
    torch.manual_seed(0)
    model, logger = NormNet(), MemoryLogger()
    trainer = fit(model, make_batches(3), [GradientClipping(NormClip(DECAY))] if saved_with else [])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    clipping = GradientClipping(NormClip(DECAY))
    fit(NormNet(), make_batches(3), [clipping], ckpt_path=tmp_path / "last.ckpt", logger=logger, max_epochs=2)
    assert logged(logger) == pytest.approx(decay(6, 6)[3:], rel=1e-6)
    assert clipping.state_dict()["attempted_steps"] == [6]


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (
            NormClip(WarmupCosine(warmup=1)),
            {},
            "does not fit the model or its training: `max_norm` must be .* which is 0 at step 0",
        ),
        (
            NormClip(WarmupLinear(warmup=0)),
            {},
            "does not fit the model or its training: `max_norm` must be .* which is 0 at step 2",
        ),
        (PerGroup({".*": NormClip(DECAY)}), {"max_epochs": -1}, "needs to know how many steps training has"),
    ],
)
def test_schedules_that_cannot_serve_stop_the_fit_at_its_start(rule: Any, arguments: Any, message: str) -> None:
    model = NormNet()
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, make_batches(2), [GradientClipping(rule)], **arguments)
    assert not model.losses


def test_schedules_that_need_no_total_do_without() -> None:
    logger, rule = MemoryLogger(), NormClip(WarmupConstant(warmup=2, start=0.5))
    fit(NormNet(), make_batches(3), [GradientClipping(rule)], logger=logger, max_epochs=-1, max_steps=3)
    assert logged(logger) == [0.5, 0.75, 1.0]


# ---- rules that must know the model


def test_the_last_layer_is_the_models_not_the_optimizers() -> None:
    """The parameter groups name the head first, as recipes with a larger rate for the head do."""

    class HeadFirst(Keeps):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))

        def configure_optimizers(self) -> Any:
            return KeepsGradients([{"params": layer.parameters()} for layer in (self.net[1], self.net[0])], lr=0.0)

    kept = []
    for callbacks in ([], [GradientClipping(AGC(clip=1e-4, exclude_last_layer=True))]):
        torch.manual_seed(0)
        kept.append(fit(HeadFirst(), make_batches(1), callbacks).optimizers[0].kept)  # type: ignore[attr-defined]
    (head, body), (head_clipped, body_clipped) = kept
    assert all(torch.equal(one, other) for one, other in zip(head, head_clipped, strict=True))
    assert all(other.norm() < 0.1 * one.norm() for one, other in zip(body, body_clipped, strict=True))


# ---- wrong use


def test_clipping_twice_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"clipped twice: by Trainer\(gradient_clip_val=0.5\) .*NormClip") as caught:
        fit(NormNet(), make_batches(2), [GradientClipping(NormClip(1.0))], gradient_clip_val=0.5, max_epochs=2)
    assert len([w for w in caught if "twice" in str(w.message)]) == 1


@pytest.mark.parametrize("value", [None, 0])
def test_clipping_once_is_not(value: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(NormNet(), make_batches(2), [GradientClipping(NormClip(1.0))], gradient_clip_val=value)
    assert not [w for w in caught if "twice" in str(w.message)]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (1.0, TypeError, r"`rule` must be a clip rule, such as NormClip\(1.0\), .* got 1.0 of type float"),
        (None, TypeError, "`rule` must be a clip rule"),
        (NormClip, TypeError, r"a class was passed: call it"),
        ([], ValueError, "`rule` must be .* non-empty list of rules, got "),
        ([NormClip(), 1.0], TypeError, r"`rule\[1\]` must be a clip rule, got 1.0"),
    ],
    ids=str,
)
def test_anything_but_rules_is_refused(rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientClipping(rule)


def test_sparse_gradients_stay_sparse() -> None:
    class Checks(SparseNet):
        def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.layouts.add(self.embedding.weight.grad.layout)

    model = Checks()
    model.layouts = set()
    fit(model, make_batches(2), [GradientClipping([NormClip(0.1), ValueClip(0.01)])])
    assert model.layouts == {torch.sparse_coo}


def test_results_are_those_of_the_rules() -> None:
    seen: list[ClipResult] = []

    class Notes(NormClip):
        def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
            assert norms is not None  # measured already, for everyone
            seen.append(super().clip_(parameters, norms))
            return seen[-1]

    logger = MemoryLogger()
    fit(NormNet(), make_batches(3), [GradientClipping(Notes(0.1)), GradientMonitor(histograms=False)], logger=logger)
    assert [float(result.norm) for result in seen] == list(logger.values("grad_norm/total").values())


def test_rules_with_schedules_come_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(GradientClipping, "callback")
    config = """
    callback:
      class_path: stability_callbacks.GradientClipping
      init_args:
        rule:
        - class_path: stability_callbacks.clipping.AGC
          init_args: {exclude_last_layer: true}
        - class_path: stability_callbacks.clipping.NormClip
          init_args:
            max_norm:
              class_path: stability_callbacks.schedules.Scaled
              init_args:
                schedule: {class_path: stability_callbacks.schedules.WarmupLinear, init_args: {warmup: 0, end: 0.5}}
                factor: 4.0
    """
    [agc, norm] = parser.instantiate(parser.parse_string(config)).callback.rules
    assert agc.exclude_last_layer
    assert repr(norm) == repr(NormClip(Scaled(WarmupLinear(warmup=0, end=0.5), factor=4.0)))
