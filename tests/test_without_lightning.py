"""Every policy in a hand-written loop and in Lightning Fabric: to read as examples, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from stability_callbacks.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    ClipResult,
    ClipRule,
    NormClip,
    OutlierClip,
    PerGroup,
    ValueClip,
    ZClip,
)
from stability_callbacks.initialization import (
    LSUV,
    Auto,
    ByPattern,
    DepthScaled,
    Kaiming,
    Normal,
    Orthogonal,
    Policy,
    Recurrent,
    TruncNormal,
    Xavier,
    ZeroResidual,
)
from stability_callbacks.numerics import log1mexp, safe_acos, safe_div, safe_log, safe_norm, safe_pow, safe_sqrt
from stability_callbacks.penalties import add_penalty_gradients_, shrink_, zero_fraction
from stability_callbacks.schedules import (
    Scaled,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.models import assert_same_bits

STEPS = 20
SPIKE = 13  # the batch whose gradients explode


class Net(nn.Module):
    """Recurrent, residual and dense layers: something for every policy."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(x)[0][:, -1]
        hidden = hidden + self.down(F.relu(self.up(hidden)))
        return self.head(hidden)


def make_batches() -> list[tuple[Tensor, Tensor, float]]:
    """Sequences, the class of each, and a factor of the loss that is huge once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 16, 5, 3, generator=generator)
    y = (x.sum((2, 3)) > 0).long()
    return [(x[step], y[step], 1e4 if step == SPIKE else 1.0) for step in range(STEPS)]


def by_hand(
    net: nn.Module,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=0.03),
    before_step: Callable[[int, torch.optim.Optimizer], Any] = lambda step, optimizer: None,
    after_step: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Train in plain PyTorch; returns the losses."""
    optimizer = make_optimizer(net.parameters())
    losses = []
    for step, (x, y, factor) in enumerate(make_batches()):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        (factor * loss).backward()
        before_step(step, optimizer)
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


def in_fabric(precision: Any) -> Any:
    def train(
        net: nn.Module,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=0.03),
        before_step: Callable[[int, torch.optim.Optimizer], Any] = lambda step, optimizer: None,
        after_step: Callable[[], Any] = lambda: None,
    ) -> list[float]:
        """The same in Fabric."""
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


WAYS: dict[str, Any] = {
    "by hand": by_hand,
    "fabric 32": in_fabric("32-true"),
    "fabric bf16": in_fabric("bf16-mixed"),
}

every_way = pytest.mark.parametrize("train", WAYS.values(), ids=WAYS)


def clip(net: nn.Module) -> None:
    NormClip(max_norm=1.0).clip_(net.parameters())


def learns(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.8 * sum(losses[:5])


# ---- clip rules

RULES: dict[str, Callable[[], ClipRule]] = {
    "norm": lambda: NormClip(max_norm=1.0),
    "norm, scheduled": lambda: NormClip(Scaled(WarmupLinear(warmup=0, end=0.5, total_steps=STEPS), factor=2.0)),
    "value": lambda: ValueClip(max_value=0.1),
    "agc": lambda: AGC(clip=0.1),
    "auto": lambda: AutoClip(percentile=50),
    "z": lambda: ZClip(warmup_steps=6, max_norm=None),
    "outlier": lambda: OutlierClip(warmup_steps=6),
    "ada": lambda: AdaGC(warmup_steps=6),
    "per group": lambda: PerGroup({"^head": NormClip(0.5), "^rnn": AutoClip(50), ".*": ValueClip(0.1)}),
}


@every_way
def test_without_a_rule_the_spike_spoils_training(train: Any) -> None:
    assert not learns(train(Net()))


@every_way
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_clip_rule_tames_a_spike(rule: Callable[[], ClipRule], train: Any) -> None:
    net, clipping, results = Net(), rule(), list[ClipResult]()
    losses = train(net, before_step=lambda *_: results.append(clipping.clip_(net.named_parameters())))
    assert learns(losses)
    assert results[SPIKE].norm > 100
    assert results[SPIKE].clipped_norm < 0.1 * results[SPIKE].norm


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_fabric_gives_what_the_hand_written_loop_gives(rule: Callable[[], ClipRule]) -> None:
    states = []
    for train in (by_hand, WAYS["fabric 32"]):
        torch.manual_seed(0)
        net, clipping = Net(), rule()
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

SCHEDULES: list[Schedule] = [
    WarmupCosine(warmup=5, cycles=2),
    WarmupLinear(warmup=0.2, end=0.1),
    WarmupStableDecay(warmup=0.1, decay=5),
    WarmupInverseSqrt(warmup=5),
    WarmupConstant(warmup=5),
    Scaled(WarmupConstant(warmup=5), factor=2.0),
]


@every_way
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_a_schedule_drives_the_learning_rate(schedule: Schedule, train: Any) -> None:
    """The reference is torch's own scheduler around the same function."""
    schedulers: list[torch.optim.lr_scheduler.LambdaLR] = []

    def make_scheduled(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=0.03)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, STEPS)))
        return optimizer

    def set_rate(step: int, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * schedule(step, STEPS)

    torch.manual_seed(0)
    net, reference = Net(), Net()
    reference.load_state_dict(net.state_dict())
    assert learns(train(net, before_step=lambda *step: (clip(net), set_rate(*step))))
    train(reference, make_scheduled, lambda *_: clip(reference), lambda: [scheduler.step() for scheduler in schedulers])
    assert_same_bits(net.state_dict(), reference.state_dict())


# ---- initialisation

POLICIES: dict[str, tuple[Policy, str]] = {
    "auto": (Auto(), "up.weight"),
    "xavier": (Xavier(), "up.weight"),
    "kaiming": (Kaiming(), "up.weight"),
    "orthogonal": (Orthogonal(), "up.weight"),
    "normal": (Normal(std=0.1), "up.weight"),
    "trunc normal": (TruncNormal(std=0.1), "up.weight"),
    "recurrent": (Recurrent(), "rnn.weight_hh_l0"),
    "depth scaled": (DepthScaled(std=0.1), "down.weight"),
    "zero residual": (ZeroResidual(Auto()), "down.weight"),
    "lsuv": (LSUV(), "up.weight"),
    "by pattern": (ByPattern({"^up": Orthogonal(), ".*": Auto()}), "up.weight"),
}


@every_way
@pytest.mark.parametrize(("policy", "changed"), POLICIES.values(), ids=POLICIES)
def test_a_policy_initialises_before_training(policy: Policy, changed: str, train: Any) -> None:
    net = Net()
    before = net.get_parameter(changed).clone()
    report = policy.apply(net, make_batches()[0][0])
    assert report[changed].what
    assert not torch.equal(net.get_parameter(changed), before)
    assert learns(train(net, before_step=lambda *_: clip(net)))


# ---- penalties


@every_way
def test_the_l2_penalty_equals_weight_decay(train: Any) -> None:
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
def test_soft_thresholding_makes_weights_exactly_zero(train: Any) -> None:
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
    safe: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], train: Any
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
