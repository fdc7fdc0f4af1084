"""Every policy in Lightning Fabric, as the contracts have it in a hand-written loop: to read as examples, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from stability_callbacks.clipping import AutoClip
from stability_callbacks.numerics import log1mexp, safe_acos, safe_div, safe_log, safe_norm, safe_pow, safe_sqrt
from stability_callbacks.penalties import add_penalty_gradients_, shrink_, zero_fraction
from tests.contracts.clipping import CLIP_RULES, tames_a_spike_in_a_loop
from tests.contracts.contract import Make
from tests.contracts.initialization import POLICIES, initializes_before_a_loop
from tests.contracts.schedules import SCHEDULES, drives_a_learning_rate_in_a_loop
from tests.loops import STEPS, Net, Train, adamw, by_hand, clip, learns, make_batches
from tests.models import assert_same_bits


def in_fabric(precision: Any) -> Train:
    def train(
        net: Any,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
        before_step: Callable[[int, torch.optim.Optimizer], Any] = lambda step, optimizer: None,
        after_step: Callable[[], Any] = lambda: None,
    ) -> list[float]:
        """The loop of `by_hand` in Fabric."""
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        model, optimizer = fabric.setup(net, make_optimizer(net.parameters()))
        losses = []
        for step, (x, y, factor) in enumerate(make_batches()):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            fabric.backward(factor * loss)
            before_step(step, optimizer)
            optimizer.step()
            after_step()
            losses.append(loss.item())
        return losses

    return train


FABRIC: dict[str, Train] = {"fabric 32": in_fabric("32-true"), "fabric bf16": in_fabric("bf16-mixed")}
WAYS: dict[str, Train] = {"by hand": by_hand, **FABRIC}

every_way = pytest.mark.parametrize("train", WAYS.values(), ids=WAYS)
in_both_precisions = pytest.mark.parametrize("train", FABRIC.values(), ids=FABRIC)
every_rule = pytest.mark.parametrize("make", CLIP_RULES.makes(), ids=lambda make: repr(make()))


# ---- clip rules


@every_way
def test_without_a_rule_the_spike_spoils_training(train: Train) -> None:
    assert not learns(train(Net()))


@in_both_precisions
@every_rule
def test_a_clip_rule_tames_a_spike(make: Make[Any], train: Train) -> None:
    tames_a_spike_in_a_loop(make, train)


@every_rule
def test_fabric_gives_what_the_hand_written_loop_gives(make: Make[Any]) -> None:
    states = []
    for train in (by_hand, WAYS["fabric 32"]):
        torch.manual_seed(0)
        net, clipping = Net(), make()
        train(net, before_step=lambda *_, net=net, clipping=clipping: clipping.clip_(net.named_parameters()))
        states.append({**net.state_dict(), "rule": clipping.state_dict()})
    assert_same_bits(*states)


def test_fabric_saves_and_loads_a_rule(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    net, rule = Net(), AutoClip()
    by_hand(net, before_step=lambda *_: rule.clip_(net.named_parameters()))
    fabric.save(tmp_path / "last.ckpt", {"net": net, "rule": rule})
    other = AutoClip()
    fabric.load(tmp_path / "last.ckpt", {"net": Net(), "rule": other})
    assert_same_bits(other.state_dict(), rule.state_dict())
    assert int(other.state_dict()["position"]) == STEPS


# ---- schedules


@in_both_precisions
@pytest.mark.parametrize("make", SCHEDULES.makes(), ids=lambda make: repr(make()))
def test_a_schedule_drives_the_learning_rate(make: Make[Any], train: Train) -> None:
    drives_a_learning_rate_in_a_loop(make, train)


# ---- initialization


@in_both_precisions
@pytest.mark.parametrize("make", POLICIES.makes(), ids=lambda make: repr(make()))
def test_a_policy_initializes_before_training(make: Make[Any], train: Train) -> None:
    initializes_before_a_loop(make, train)


# ---- penalties


@every_way
def test_the_l2_penalty_equals_weight_decay(train: Train) -> None:
    torch.manual_seed(0)
    net, reference = Net(), Net()
    reference.load_state_dict(net.state_dict())

    def clip_and_penalize(*_: Any) -> None:
        clip(net)
        add_penalty_gradients_(list(net.parameters()), l2=0.1)

    train(net, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), clip_and_penalize)
    decaying = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    train(reference, decaying, lambda *_: clip(reference))
    assert_same_bits(net.state_dict(), reference.state_dict())


@every_way
def test_soft_thresholding_makes_weights_exactly_zero(train: Train) -> None:
    net = Net()
    weights = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    losses = train(
        net,
        before_step=lambda *_: clip(net),
        after_step=lambda: shrink_(weights, l1=0.03 * 0.1),
    )
    assert learns(losses)
    assert 0.01 < float(zero_fraction(weights)) < 0.9


# ---- safe functions

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sqrt": (safe_sqrt, torch.sqrt),
    "log": (safe_log, torch.log),
    "div": (lambda x: safe_div(x, x), lambda x: x / x),
    "norm": (lambda x: safe_norm(x, dim=-1), lambda x: x.square().sum(-1).sqrt()),
    "acos": (lambda x: safe_acos(x + 1), lambda x: torch.acos(x + 1)),
    "pow": (lambda x: safe_pow(x, 0.3), lambda x: torch.pow(x, 0.3)),
    "log1mexp": (log1mexp, lambda x: torch.log(1 - torch.exp(x))),
}


@every_way
@pytest.mark.parametrize(("safe", "plain"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_safe_function_at_its_boundary_does_not_end_training(
    safe: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], train: Train
) -> None:
    """An extra output of the network is exactly 0, where each of the plain functions has no finite gradient."""

    class AtTheBoundary(Net):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits + 1e-3 * self.function(0 * logits).mean()

    for function, survives in ((safe, True), (plain, False)):
        net = AtTheBoundary(function)
        losses = train(net, before_step=lambda *_, net=net: clip(net))
        assert learns(losses) == survives
        assert all(parameter.isfinite().all() for parameter in net.parameters()) == survives
