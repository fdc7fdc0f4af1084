"""The laws of the house, on whole models: order, invisible observers, perfect skips, clean statistics, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, lr_scheduler

from stability_callbacks import (
    FaultInjector,
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    Initialization,
    LRSchedule,
    Rollback,
    StepGuard,
    stability_suite,
)
from stability_callbacks.clipping import NormClip, ValueClip, ZClip
from stability_callbacks.detection import Detector, InputRange, NonFinite, Spike, StepEvidence
from stability_callbacks.diagnosis import read_incidents
from stability_callbacks.faults import Fault
from stability_callbacks.schedules import WarmupConstant, WarmupCosine
from tests.models import (
    MODELS,
    AverageClip,
    BufferNet,
    LossNet,
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
    training_state,
)

# Two of a kind are used on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:There are 2 (guards|clippings) among the trainer's callbacks")

NAN, INF = float("nan"), float("inf")

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "adamw_for_loop": lambda p: AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw_amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: Adafactor(p, lr=0.01),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "adamw_fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adam_fused_amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True, fused=True),
    "adagrad_fused": lambda p: Adagrad(p, lr=0.01, fused=True),
    "sgd_fused": lambda p: SGD(p, lr=0.05, weight_decay=0.01, fused=True),
    "momentum_fused": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
}
SOME_OPTIMIZERS = ("momentum", "adamw_foreach", "adamw_fused", "momentum_fused")


class Result(NamedTuple):
    """What a run leaves behind."""

    state: dict[str, Any]
    trainer: pl.Trainer
    record: list[Any]


def run(make: Callable[[], pl.LightningModule], batches: Any, callbacks: Any = (), **arguments: Any) -> Result:
    torch.manual_seed(0)
    logger, model = MemoryLogger(), make()
    trainer = fit(model, batches, callbacks, **{"logger": logger, **arguments})
    return Result(training_state(model, trainer), trainer, logger.calls)


def insert(batches: list[Any], bad: dict[int, Any]) -> list[Any]:
    """Put a bad batch before each of some good ones; at the end for the position after the last."""
    return [each for i in range(len(batches) + 1) for each in [*bad.get(i, []), *batches[i : i + 1]]]


def assert_same_records(one: list[Any], other: list[Any]) -> None:
    assert [(step, sorted(metrics)) for step, metrics in one] == [(step, sorted(metrics)) for step, metrics in other]
    assert_same_bits(
        [list(dict(sorted(m.items())).items()) for _, m in one],
        [list(dict(sorted(m.items())).items()) for _, m in other],
    )


# ---- law 1: order does not matter


def suite() -> list[Any]:
    """The suite, with a schedule, with clipping that bites at these models' norms, and without bundles."""
    others = (GradientClipping, FlightRecorder)
    callbacks = [c for c in stability_suite("mlp", schedule=True) if not isinstance(c, others)]
    return [*callbacks, GradientClipping(NormClip(0.3)), FlightRecorder(max_bundles=0)]


def orders(callbacks: Callable[[], list[Any]], sizes: Any) -> list[Any]:
    indices = range(len(callbacks()))
    return [order for size in sizes for subset in combinations(indices, size) for order in permutations(subset)]


BAD_RUN = insert(make_batches(5), {0: [poison(make_batches(1)[0])], 3: [poison(make_batches(1)[0], INF)]})


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_the_suite_gives_the_same_training_and_the_same_record(name: str) -> None:
    first, *others = list(permutations(range(len(suite()))))[::17]
    expected = run(MODELS[name], BAD_RUN, [suite()[i] for i in first])
    assert {name for _, metrics in expected.record for name in metrics} >= {
        "lr/SGD",
        "grad_norm/total",
        "grad_norm_clipped/total",
        "stability/skipped_steps",
        "stability/clipped_fraction",
    }
    for order in others:
        result = run(MODELS[name], BAD_RUN, [suite()[i] for i in order])
        assert_same_bits(result.state, expected.state)
        assert_same_records(result.record, expected.record)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused"])
def test_any_order_of_any_subset_does_too(optimizer: str) -> None:
    """With an initialisation, a second clipping, Lightning's own monitor, and a cadence that leaves steps unread."""

    def callbacks() -> list[Any]:
        second = GradientClipping(ValueClip(0.2))
        return [*suite(), second, Initialization(verbose=False), LearningRateMonitor("step")]

    def train(order: Any) -> Result:
        chosen = [callbacks()[i] for i in order]
        return run(lambda: NormNet(OPTIMIZERS[optimizer]), BAD_RUN, chosen, log_every_n_steps=3)

    expected: dict[Any, Result] = {}
    for order in [*orders(callbacks, sizes=(2,)), *orders(callbacks, sizes=(9,))[::30_011]]:
        subset = tuple(sorted(order))
        result = train(order)
        first = expected.setdefault(subset, result)
        assert_same_bits(result.state, first.state)
        assert_same_records(result.record, first.record)
    assert len(expected) == 36 + 1


@pytest.mark.parametrize(
    "arguments",
    [{"accumulate_grad_batches": 2}, {"plugins": fp16}, {"precision": "bf16-mixed"}, {"manual": True}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_order_does_not_matter_in_other_ways_of_training(arguments: dict[str, Any]) -> None:
    make = TwoOptimizers if arguments.pop("manual", False) else NormNet

    def train(order: Any) -> Result:
        plugins = {"plugins": [arguments["plugins"]()]} if "plugins" in arguments else {}
        return run(make, BAD_RUN, [suite()[i] for i in order], **{**arguments, **plugins})

    first, *others = list(permutations(range(len(suite()))))[::101]
    expected = train(first)
    for order in others:
        result = train(order)
        assert_same_bits(result.state, expected.state)
        assert_same_records(result.record, expected.record)


@pytest.mark.filterwarnings("ignore:FaultInjector puts faults into")
@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused"])
def test_order_does_not_matter_when_training_goes_back(optimizer: str, tmp_path: Path) -> None:
    """Faults of several kinds, a rollback with a lower rate after it, and the incidents are the same, too."""

    def callbacks(directory: Path) -> list[Any]:
        faults = [Fault("weight", "nan", steps=5), Fault("input", "inf", steps=8), Fault("loss", 1e6, steps=9)]
        return [
            FaultInjector(faults),
            StepGuard([NonFinite(), Spike(window=8, min_history=3, threshold=20.0)]),
            GradientClipping(ZClip(warmup_steps=2)),
            LRSchedule(WarmupConstant(warmup=4)),
            GradientMonitor(),
            Rollback(every_n_steps=2, patience=2),
            FlightRecorder(directory, max_bundles=0),
        ]

    def train(number: int, order: Any) -> tuple[Result, list[Any]]:
        directory = tmp_path / str(number)
        chosen = [callbacks(directory)[i] for i in order]
        result = run(lambda: NormNet(OPTIMIZERS[optimizer]), make_batches(13), chosen)
        return result, read_incidents(directory / "incidents.jsonl")

    chosen = list(permutations(range(7)))[::701]
    (expected, incidents), *others = [train(number, order) for number, order in enumerate(chosen)]
    assert {"nonfinite", "spike", "rollback"} <= {incident.kind for incident in incidents}
    for result, others_incidents in others:
        assert_same_bits(result.state, expected.state)
        assert_same_records(result.record, expected.record)
        assert [replace(each, time="") for each in others_incidents] == [replace(each, time="") for each in incidents]


# ---- law 2: observers are invisible


def observers() -> list[Any]:
    """Monitors that log all they can, and guards, clips and schedules that never have anything to do."""
    return [
        GradientMonitor(per="parameter", every_n_steps=1),
        GradientMonitor(norm_type=INF, histograms=False),
        StepGuard([NonFinite()]),
        StepGuard([Never()], protect_buffers=False),
        GradientClipping(NormClip(1e6)),
        GradientClipping(ValueClip(1e6)),
        LRSchedule(WarmupConstant(warmup=0)),
        Rollback(every_n_steps=2),
        FlightRecorder(),
        FaultInjector(Fault("weight", steps=10**6)),
    ]


class Never(Detector):
    kind: ClassVar[str] = "never"

    def __repr__(self) -> str:
        return "Never()"

    def __call__(self, evidence: StepEvidence) -> Tensor:
        return torch.zeros_like(evidence.gradients.finite)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulation": lambda: {"accumulate_grad_batches": 3},
    "trainer_clipping": lambda: {"gradient_clip_val": 0.1},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [fp16()]},
    "double": lambda: {"precision": "64-true"},
}


def is_fused(optimizer: str) -> bool:
    return "fused" in optimizer


COMBINATIONS = [
    (way, optimizer)
    for way in WAYS
    for optimizer in SOME_OPTIMIZERS
    if not (way == "trainer_clipping" and is_fused(optimizer))
]


@pytest.mark.parametrize(("way", "optimizer"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore:Gradients are clipped twice", "ignore:FaultInjector puts faults into")
def test_observers_change_no_bit(way: str, optimizer: str, tmp_path: Path) -> None:
    batches = make_batches(5)
    if way == "double":
        batches = [(x.double(), y) for x, y in batches]
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    bare = run(make, batches, max_epochs=2, **WAYS[way]())
    after = torch.get_rng_state()
    loggers = [TensorBoardLogger(tmp_path), MemoryLogger()]
    watched = run(make, batches, observers(), max_epochs=2, **{**WAYS[way](), "logger": loggers})
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_bits(watched.state, bare.state)
    assert len(loggers[1].calls) > 1


@pytest.mark.parametrize("optimizer", ["momentum", "adamw_foreach", "adamw_fused", "sgd_fused"])
def test_a_guard_that_does_not_vote_leaves_overflows_to_the_scaler(optimizer: str) -> None:
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    bare = run(make, make_batches(8), plugins=[fp16(2.0**20)])
    guarded = run(make, make_batches(8), [StepGuard([Never()]), GradientMonitor()], plugins=[fp16(2.0**20)])
    assert bare.trainer.precision_plugin.scaler.get_scale() < 2.0**20
    assert_same_bits(guarded.state, bare.state)


@pytest.mark.filterwarnings("ignore:FaultInjector puts faults into")
@pytest.mark.parametrize("make", [SparseNet, MODELS["tied"], TwoOptimizers, BufferNet])
def test_observers_change_no_bit_of_other_models(make: Any) -> None:
    batches = make_batches(6)
    # A sparse gradient is coalesced by clamping, which changes the order of the sums in momentum.
    callbacks = [c for c in observers() if make is not SparseNet or not isinstance(c, GradientClipping)]
    assert_same_bits(run(make, batches, callbacks).state, run(make, batches).state)


# ---- law 3: a skip is a perfect no-op


def clip() -> GradientClipping:
    return GradientClipping(NormClip(0.5))


def assert_healed(make: Any, bad: list[Any], good: list[Any], skips: int, rule: Any = clip, **arguments: Any) -> None:
    """A guarded run over bad batches equals a run over the good ones, bit for bit."""
    guard = StepGuard()
    healed = run(make, bad, [rule(), GradientMonitor(), guard], **arguments)
    assert guard.skipped_steps == skips
    assert_same_bits(healed.state, run(make, good, [rule()], **arguments).state)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [*((name, "32-true") for name in OPTIMIZERS), *((name, "bf16-mixed") for name in SOME_OPTIMIZERS)],
)
def test_a_run_with_bad_batches_equals_one_without_them(optimizer: str, precision: str) -> None:
    good = make_batches(6)
    nan, inf = poison(good[0]), poison(good[1], -INF)
    bad = insert(good, {0: [nan, inf], 1: [inf], 3: [nan], 6: [inf, nan]})
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    assert_healed(make, bad, good, skips=6, precision=precision, log_every_n_steps=4)


@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
@pytest.mark.parametrize("make", [BufferNet, LossNet, MODELS["tied"]])
def test_whatever_it_is_that_is_not_finite(make: Any, optimizer: str) -> None:
    """Only a buffer, only the loss, or the gradients of a model with tied, frozen and unused weights."""
    good = make_batches(6)
    bad = insert(good, {0: [poison(good[0])], 4: [poison(good[1], INF), poison(good[1])]})
    assert_healed(lambda: make(OPTIMIZERS[optimizer]), bad, good, skips=3)


@pytest.mark.parametrize("rule", [clip, lambda: GradientClipping([ValueClip(0.01), NormClip(0.05)])])
def test_sparse_gradients(rule: Any) -> None:
    good = make_batches(6)
    bad = insert(good, {0: [poison(good[0])], 4: [poison(good[1], INF)]})
    assert_healed(SparseNet, bad, good, skips=2, rule=rule)


@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_under_accumulation_the_whole_window_is_dropped(position: int, optimizer: str) -> None:
    good = make_batches(12)
    window = make_batches(4, seed=1)
    window[position] = poison(window[position])
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    bad = [*window, *good[:4], *window, *good[4:], *window]
    assert_healed(make, bad, good, skips=3, accumulate_grad_batches=4)


@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
@pytest.mark.parametrize("position", [0, 1])
def test_a_window_that_an_epoch_cuts_short_is_dropped_too(position: int, optimizer: str) -> None:
    good, window = make_batches(8), make_batches(2, seed=1)
    window[position] = poison(window[position])
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    assert_healed(make, [*good, *window], good, skips=3, accumulate_grad_batches=4, max_epochs=3)


def test_the_last_window_after_a_cut_one_is_whole_again() -> None:
    """An epoch of 6 batches in windows of 4: a bad batch spoils its own window of 4 or 2 and no other."""
    good = make_batches(6)
    bad = [*good[:5], poison(good[5])]
    assert_healed(NormNet, bad, good[:4], skips=2, accumulate_grad_batches=4, max_epochs=2)
    bad = [poison(good[0]), *good[1:]]
    assert_healed(NormNet, bad, good[4:], skips=2, accumulate_grad_batches=4, max_epochs=2)


def test_manual_optimization_with_two_optimizers() -> None:
    good = make_batches(6)
    bad = insert(good, {0: [poison(good[0])], 3: [poison(good[1], INF)], 6: [poison(good[1])]})
    assert_healed(TwoOptimizers, bad, good, skips=6)


class EachItsOwn(pl.LightningModule):
    """Manual optimization where bad batches concern some of the networks; the reference leaves them out there."""

    def __init__(self, optimizer: Callable[[Any], Optimizer], bad: tuple[int, ...], avoid: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(2))
        self.make_optimizer, self.bad, self.avoid = optimizer, bad, avoid

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for index, (optimizer, net) in enumerate(zip(self.optimizers(), self.nets, strict=True)):
            if index not in self.bad:
                inputs = x.nan_to_num(0.0)
            elif x.isnan().any() and self.avoid:
                continue
            else:
                inputs = x
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(inputs), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(net.parameters()) for net in self.nets]


@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["32", "fp16"])
def test_a_skip_of_one_optimizer_is_none_of_the_others_business(
    scaled: bool, bad: tuple[int, ...], optimizer: str
) -> None:
    batches = make_batches(6)
    batches[0], batches[3] = poison(batches[0]), poison(batches[3])

    def train(avoid: bool, *callbacks: pl.Callback) -> Result:
        plugins = [fp16()] if scaled else []
        return run(lambda: EachItsOwn(OPTIMIZERS[optimizer], bad, avoid), batches, callbacks, plugins=plugins)

    guard = StepGuard()
    healed = train(False, guard)
    assert guard.skipped_steps == 2 * len(bad)
    assert_same_bits(healed.state, train(True).state)


class Absurd(Detector):
    """Votes against a large loss, which is finite: nothing that a loss scaler would notice."""

    kind: ClassVar[str] = "absurd"

    def __repr__(self) -> str:
        return "Absurd()"

    def __call__(self, evidence: StepEvidence) -> Tensor:
        assert evidence.loss is not None
        return evidence.loss > 20


class LoudNet(NormNet):
    """A network whose loss is as loud as its labels say."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return super().loss((x, y % 3)) * torch.where((y > 2).any(), 50.0, 1.0)


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        *((name, "fp16") for name in OPTIMIZERS),
        *((name, way) for name in SOME_OPTIMIZERS for way in ("plain", "bf16", "accumulation")),
    ],
)
def test_finite_steps_can_be_skipped_as_perfectly(optimizer: str, way: str) -> None:
    good = make_batches(6)
    loud = [(x, y + 3) for x, y in make_batches(3, seed=1)]
    window = way == "accumulation"
    bad = insert(good, {0: loud, 3: loud} if window else {0: loud[:1], 2: loud[1:]})
    make = lambda: LoudNet(OPTIMIZERS[optimizer])  # noqa: E731
    guard = StepGuard([Absurd()])
    healed = run(make, bad, [clip(), GradientMonitor(), guard], **WAYS[way]())
    assert guard.skipped_steps == (2 if window else 3)
    assert_same_bits(healed.state, run(make, good, [clip()], **WAYS[way]()).state)


@pytest.mark.parametrize(
    "rule", [clip, lambda: GradientClipping(ValueClip(0.05)), lambda: GradientClipping(AverageClip())]
)
@pytest.mark.parametrize("optimizer", [*SOME_OPTIMIZERS, "adafactor", "adagrad_fused"])
def test_under_a_loss_scale_only_the_scale_remembers(optimizer: str, rule: Any) -> None:
    good = make_batches(6)
    bad = insert(good, {0: [poison(good[0])], 3: [poison(good[1], INF)], 6: [poison(good[1])]})
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    guard = StepGuard()
    healed = run(make, bad, [rule(), GradientMonitor(), guard], plugins=[fp16(1024.0)])
    assert guard.skipped_steps == 3
    assert healed.trainer.precision_plugin.scaler.get_scale() == 128.0
    # Scales are powers of two, so at these magnitudes the gradients have the same bits under each.
    assert_same_bits(healed.state, run(make, good, [rule()], plugins=[fp16(256.0)]).state)


@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
def test_a_scale_that_is_too_high_at_first_costs_steps_and_nothing_else(optimizer: str) -> None:
    good = make_batches(4)
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    guard = StepGuard()
    overflows = [good[0]] * 8
    healed = run(make, [*overflows, *good], [guard, clip()], plugins=[fp16(2.0**24)])
    skipped = guard.skipped_steps
    assert 0 < skipped < 8
    expected = run(make, [*overflows[skipped:], *good], [clip()], plugins=[fp16(2.0 ** (24 - skipped))])
    assert_same_bits(healed.state, expected.state)


# ---- law 4: non-finite values never enter a statistic


@pytest.mark.parametrize("way", ["plain", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
def test_statistics_are_those_of_the_good_steps(optimizer: str, way: str) -> None:
    good = make_batches(6)
    bad = insert(good, {0: [poison(good[0])], 3: [poison(good[1], INF)], 6: [poison(good[1])]})
    make = lambda: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
    states = []
    for batches in (bad, good):
        clipping = GradientClipping(AverageClip())
        run(make, batches, [clipping, StepGuard()], **WAYS[way]())
        states.append(clipping.state_dict())
    assert states[0].pop("nonfinite_norms") == 3
    assert states[1].pop("nonfinite_norms") == 0
    assert [state.pop("attempted_steps") for state in states] == [[9], [6]]  # the clock goes on
    assert_same_bits(*states)
    [[state]] = states[0]["rules"]
    assert state["count"] == 6


@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
def test_a_skipped_spike_is_not_in_the_statistics_either(optimizer: str) -> None:
    good = make_batches(6)
    bad = insert(good, {0: [(x, y + 3) for x, y in good[:1]], 4: [(x, y + 3) for x, y in good[1:3]]})
    states = []
    for batches in (bad, good):
        clipping, guard = GradientClipping(AverageClip()), StepGuard([Absurd()])
        run(lambda: LoudNet(OPTIMIZERS[optimizer]), batches, [clipping, guard])
        states.append(clipping.state_dict())
    assert guard.skipped_steps == 0
    assert [state.pop("attempted_steps") for state in states] == [[9], [6]]
    assert_same_bits(*states)


class Idle(NormNet):
    """A model that sometimes has nothing to learn: no loss, or a loss that depends on nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss * 0 if batch_idx == 2 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_zero_norms_and_steps_without_gradients_are_no_statistics() -> None:
    clipping, guard = GradientClipping(AverageClip()), StepGuard()
    run(Idle, make_batches(6), [clipping, guard])
    [[state]] = clipping.state_dict()["rules"]
    assert state["count"] == 4
    assert guard.skipped_steps == 0
    assert len(guard.state_dict()["recent"]) == 5


# ---- law 5: resume is exact


class Saver(pl.Callback):
    """Saves a checkpoint after some batches, counted over all epochs."""

    def __init__(self, dirpath: Path, after: Any) -> None:
        self.dirpath = dirpath
        self.after = after

    def path(self, batches: int) -> Path:
        return self.dirpath / f"{batches}.ckpt"

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        seen = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if seen in self.after:
            trainer.save_checkpoint(self.path(seen))


class Scheduled(TinyModel):
    """A network with batch normalisation, and a scheduler of its own if wanted."""

    def __init__(self, optimizer: str, scheduler: bool) -> None:
        super().__init__(OPTIMIZERS[optimizer])
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 3))
        self.scheduler = scheduler

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.scheduler:
            return optimizer
        return [optimizer], [{"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 20), "interval": "step"}]


EPOCH = [poison(b) if index in (0, 4, 5, 6) else b for index, b in enumerate(make_batches(9))]
# After the first step; in a streak of skips; at an epoch's end; early in the next epoch; right after the streak.
SAVE_POINTS = (1, 6, 9, 11, 16)


def states_of(trainer: pl.Trainer) -> dict[str, Any]:
    return {c.state_key: c.state_dict() for c in trainer.callbacks if not isinstance(c, Saver) and c.state_dict()}


def assert_resumes(
    make: Callable[[], pl.LightningModule],
    callbacks: Callable[[], list[Any]],
    tmp_path: Path,
    last: bool = True,
    points: Any = SAVE_POINTS,
    batches: Any = EPOCH,
    **arguments: Any,
) -> None:
    settings = {"max_epochs": 2, "log_every_n_steps": 2, **arguments}

    def train(ckpt_path: Path | None, after: Any) -> Result:
        saver = Saver(tmp_path, after)
        order = [*callbacks(), saver] if last else [saver, *callbacks()]
        fresh = {name: value() if callable(value) else value for name, value in settings.items()}
        return run(make, batches, order, ckpt_path=ckpt_path, **fresh)

    whole = train(None, points)
    for point in points:
        path = Saver(tmp_path, ()).path(point)
        checkpoint = torch.load(path, weights_only=True)
        resumed = train(path, ())
        assert resumed.trainer.global_step == whole.trainer.global_step
        assert_same_bits(resumed.state, whole.state)
        assert_same_bits(states_of(resumed.trainer), states_of(whole.trainer))
        # A saver at the front saves before the log entry of that very step is written.
        done = max((step for step, _ in whole.record if step < checkpoint_step(checkpoint)), default=-1)
        assert_same_records(resumed.record, [entry for entry in whole.record if entry[0] > done])


def checkpoint_step(checkpoint: dict[str, Any]) -> int:
    """Where on the x-axis the first step after the checkpoint lies."""
    stepped: int = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    return stepped + 1


def stateful_suite() -> list[Any]:
    return [
        GradientMonitor(),
        GradientClipping([ValueClip(5.0), AverageClip()]),  # clips about every second step
        StepGuard([NonFinite()], max_consecutive_skips=9, max_skipped_share=0.9, share_window=7),
        StepGuard([Absurd(), Spike(window=8, min_history=4), InputRange(100.0)]),
        LRSchedule(WarmupCosine(warmup=4)),
        Rollback(every_n_steps=3),
    ]


@pytest.mark.parametrize("last", [True, False], ids=["saver last", "saver first"])
@pytest.mark.parametrize("scheduler", [True, False], ids=["scheduler", "no scheduler"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused"])
def test_interrupted_and_resumed_equals_uninterrupted(
    optimizer: str, scheduler: bool, last: bool, tmp_path: Path
) -> None:
    assert_resumes(lambda: Scheduled(optimizer, scheduler), stateful_suite, tmp_path, last)


@pytest.mark.parametrize("last", [True, False], ids=["saver last", "saver first"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused"])
def test_resume_under_a_loss_scale(optimizer: str, last: bool, tmp_path: Path) -> None:
    make = lambda: Scheduled(optimizer, False)  # noqa: E731
    assert_resumes(make, stateful_suite, tmp_path, last, points=(6, 11), plugins=lambda: [fp16()])


@pytest.mark.parametrize("last", [True, False], ids=["saver last", "saver first"])
def test_resume_under_accumulation_and_in_manual_optimization(last: bool, tmp_path: Path) -> None:
    make = lambda: Scheduled("momentum", False)  # noqa: E731
    epoch = [poison(batch) if index == 4 else batch for index, batch in enumerate(make_batches(9))]
    assert_resumes(
        make, stateful_suite, tmp_path, last, points=(3, 6, 12, 15), batches=epoch, accumulate_grad_batches=3
    )
    assert_resumes(TwoOptimizers, stateful_suite, tmp_path, last, points=(1, 6, 11))


class RestoresLate(pl.strategies.SingleDeviceStrategy):
    """A strategy that loads checkpoints after ``on_fit_start``, as those of sharded models do."""

    restore_checkpoint_after_setup = True


def test_resume_where_states_are_loaded_late(tmp_path: Path) -> None:
    make = lambda: Scheduled("momentum", False)  # noqa: E731
    assert_resumes(make, stateful_suite, tmp_path, points=(6, 11), strategy=lambda: RestoresLate("cpu"))


def test_a_streak_of_skips_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Three skips before the interruption and two after it make five in a row."""
    good = make_batches(4)
    batches = [*good, *[poison(good[0])] * 5, *good]
    saver = Saver(tmp_path, (7,))
    for optimizer in ("momentum", "adamw_fused"):
        make = lambda optimizer=optimizer: NormNet(OPTIMIZERS[optimizer])  # noqa: E731
        with pytest.raises(RuntimeError, match=r"5 steps in a row .* step 8 "):
            run(make, batches, [StepGuard(max_consecutive_skips=5), saver])
        with pytest.raises(RuntimeError, match=r"5 steps in a row .* step 8 "):
            run(make, batches, [StepGuard(max_consecutive_skips=5)], ckpt_path=saver.path(7))
