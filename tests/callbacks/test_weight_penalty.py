"""The penalty against torch's own weight decay and hand-computed values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from stability_callbacks import GradientClipping, StepGuard, WeightPenalty
from stability_callbacks.clipping import NormClip
from tests.models import NormNet, assert_same_bits, fit, make_batches, poison, training_state


def run(optimizer: Any, callbacks: list[Any], batches: Any = None, **arguments: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    model = NormNet(optimizer)
    trainer = fit(model, batches or make_batches(6), callbacks, **arguments)
    return training_state(model, trainer)["model"], trainer


def sgd(weight_decay: float = 0.0, **arguments: Any) -> Any:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=weight_decay, **arguments)

    return make


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"fp16": True}],
    ids=["fp32", "bf16", "accumulation", "fp16"],
)
def test_l2_equals_torchs_weight_decay_to_the_last_bit(arguments: dict[str, Any], fused: bool) -> None:
    settings = [{"plugins": [scaler()]} if arguments.get("fp16") else arguments for _ in range(2)]
    ours, _ = run(sgd(fused=fused), [WeightPenalty(l2=0.1, parameters=".")], **settings[0])
    theirs, _ = run(sgd(0.1, fused=fused), [], **settings[1])
    if fused:  # the kernel adds the decay in one operation with the rest, so a last bit may differ
        torch.testing.assert_close(ours, theirs)
    else:
        assert_same_bits(ours, theirs)


def test_comes_after_our_clipping_and_the_trainers() -> None:
    theirs, _ = run(sgd(0.1), [], gradient_clip_val=0.3)
    ours, _ = run(sgd(), [WeightPenalty(l2=0.1, parameters="."), GradientClipping(NormClip(0.3))])
    trainers, _ = run(sgd(), [WeightPenalty(l2=0.1, parameters=".")], gradient_clip_val=0.3)
    assert_same_bits(ours, theirs)
    assert_same_bits(trainers, theirs)


def test_decoupled_l2_equals_adamws_decay() -> None:
    penalty = WeightPenalty(l2=0.2, parameters=".", decoupled=True)
    ours, _ = run(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0), [penalty])
    theirs, _ = run(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2), [])
    assert_same_bits(ours, theirs)


def test_l1_adds_the_sign() -> None:
    start, _ = run(lambda p: torch.optim.SGD(p, lr=0.0), [])
    plain, _ = run(lambda p: torch.optim.SGD(p, lr=0.1), [], make_batches(1))
    ours, _ = run(lambda p: torch.optim.SGD(p, lr=0.1), [WeightPenalty(l1=0.5)], make_batches(1))
    name = "net.0.weight"
    torch.testing.assert_close(ours[name], plain[name] - 0.1 * 0.5 * start[name].sign())


@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_l1_makes_exact_zeros_and_logs_their_share(tmp_path: Any, fused: bool) -> None:
    logger = CSVLogger(tmp_path)
    penalty = WeightPenalty(l1=0.3, decoupled=True)
    state, _ = run(sgd(fused=fused), [penalty], logger=logger)
    share = float((state["net.0.weight"] == 0).float().mean())
    assert 0.05 < share < 1
    assert (state["net.0.bias"] != 0).all()
    metrics = logger.experiment.metrics[-1] if logger.experiment.metrics else {}
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text() + str(metrics)
    assert "stability/l1" in text
    assert "stability/zero_fraction" in text


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_not_penalized(fused: bool, decoupled: bool) -> None:
    good = make_batches(6)
    bad = [poison(good[0]), *good[:3], poison(good[1]), *good[3:]]

    def callbacks() -> list[Any]:
        return [WeightPenalty(l1=0.01, l2=0.1, decoupled=decoupled), StepGuard()]

    healed, _ = run(sgd(fused=fused), callbacks(), bad)
    expected, _ = run(sgd(fused=fused), callbacks(), good)
    assert_same_bits(healed, expected)


def test_copies_and_bad_arguments() -> None:
    penalty = WeightPenalty(l1=0.1, parameters="w")
    for copied in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert vars(copied) == vars(penalty)
    with pytest.raises(ValueError, match="`l1` or `l2` must be > 0"):
        WeightPenalty()
    with pytest.raises(ValueError, match="`l2`"):
        WeightPenalty(l2=-1)
    with pytest.raises(ValueError, match="`parameters` must be a regular expression"):
        WeightPenalty(l1=1, parameters="(")
    with pytest.raises(TypeError, match="`decoupled`"):
        WeightPenalty(l1=1, decoupled=1)  # type: ignore[arg-type]
