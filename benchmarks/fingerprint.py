"""Whether a change keeps every bit of training: ``python -m benchmarks.fingerprint --help``.

A refactoring must leave weights, records and metrics as they were. Take a fingerprint before it and compare after it,
on the same machine, since other processors and other versions of torch round differently::

    python -m benchmarks.fingerprint --out before.json
    python -m benchmarks.fingerprint --against before.json             # prints what differs; exit code 1 if any does
    python -m benchmarks.fingerprint --against before.json --only law  # only runs whose name has "law" in it

Two kinds of runs are made:

- ``law/...``: small models that have what is hard to keep (batch normalization, sparse gradients, tied and unused
  weights, two optimizers in manual optimization), with the suite, faults of all kinds, skips, rollbacks in memory and
  on disk, accumulation, loss scales, fused optimizers, every clip rule, schedule and initialization, and resumes.
- ``recipe/...``: seed 0 of every scenario of every recipe, plain and healed, each as ``python -m recipes.<name>`` in a
  process of its own. Only ``Trainer.fit`` is wrapped there, so nothing of the recipes' inside is relied on.

Of each run is kept, entry by entry: weights and buffers, the state of optimizers, learning-rate schedulers, loss scaler
and torch's random stream, the callbacks' states and counts, each metric's series, each histogram's, incidents without
their time and with paths and lines of source left out, what lies in bundles and checkpoints, and how training ended.
Tensors and long lists are SHA-256 sums of dtype, shape and bytes; all NaNs count as the same. What is short is kept as
it is, so that a difference can be read. An entry whose name alone has changed is reported as renamed. Names that runs
draw at random are numbered.

The models are defined here and only public names of the package are used, so the file can be copied to other commits.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import asdict, dataclass, is_dataclass
from difflib import SequenceMatcher
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
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
    TrainingDivergedError,
    WeightPenalty,
    stability_suite,
)
from stability_callbacks.clipping import AGC, AdaGC, AutoClip, ClipRule, NormClip, PerGroup, ValueClip, ZClip
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.faults import Fault
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
from stability_callbacks.schedules import (
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)

Entries = dict[str, str]
"""Name of what was compared, such as ``weights.net.0.bias``, to its fingerprint."""

RECIPES = {
    "mlp": ("exploding", "poisoned", "vanishing"),
    "resnet": ("exploding", "poisoned", "scaled", "stuck", "vanishing"),
    "lstm": ("exploding", "poisoned", "relu_rnn", "sine"),
    "transformer": ("poisoned", "stuck"),
}

LONGEST_READABLE = 8  # items of a list that is kept as it is
COUNTS = ("skipped_steps", "rollbacks", "incidents", "injected")
PLACE_IN_SOURCE = re.compile(r"\S*\.pyi?(?::|, line )\d+")


# ---- fingerprints


def entries_of(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The entries of a nested state, one for each tensor, each plain value, and each list of plain values."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from entries_of(value[key], f"{name}.{key}")
    elif is_dataclass(value) and not isinstance(value, type):
        yield from entries_of(asdict(value), name)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        yield from entries_of(value._asdict(), name)
    elif isinstance(value, (list, tuple)) and not all(map(_is_plain, value)):
        for index, item in enumerate(value):
            yield from entries_of(item, f"{name}.{index}")
    elif isinstance(value, (list, tuple)):
        text = repr(list(value))
        yield name, text if len(value) <= LONGEST_READABLE else f"{len(value)} values {_sha(text.encode())}"
    elif isinstance(value, (Tensor, np.ndarray)):
        yield name, _tensor_print(torch.as_tensor(value))
    else:
        yield name, repr(value) if _is_plain(value) else f"<{type(value).__qualname__}>"


def digest_of(value: Any) -> str:
    """One sum for all entries of a nested state."""
    return _sha("\n".join(f"{name} {text}" for name, text in entries_of(value, "")).encode())


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, bytes, Path))


def _tensor_print(tensor: Tensor) -> str:
    values = tensor.detach().to_dense().cpu().contiguous().reshape(-1)
    if values.is_floating_point():
        values = torch.where(values.isnan(), torch.full_like(values, float("nan")), values)
    return f"{tensor.dtype}{list(tensor.shape)} {_sha(values.view(torch.uint8).numpy().tobytes())}"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def state_entries(module: pl.LightningModule, trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    """What training leaves in memory."""
    yield from entries_of(module.state_dict(), "weights")
    persistent = module.state_dict().keys()
    yield from entries_of({k: v for k, v in module.named_buffers() if k not in persistent}, "buffers")
    yield from entries_of([optimizer.state_dict() for optimizer in trainer.optimizers], "optimizers")
    yield from entries_of([each.scheduler.state_dict() for each in trainer.lr_scheduler_configs], "lr_schedulers")
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    yield from entries_of(None if scaler is None else scaler.state_dict(), "scaler")
    yield "global_step", repr(trainer.global_step)
    yield from entries_of(torch.get_rng_state(), "random_stream")
    seen: Counter[str] = Counter()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not type(callback).__module__.startswith("stability_callbacks"):
            continue
        kind = type(callback).__name__
        name = f"callbacks.{kind}.{seen[kind]}"
        seen[kind] += 1
        yield f"{name}.state_key", repr(callback.state_key)
        yield from entries_of(callback.state_dict(), f"{name}.state")
        yield from entries_of({c: getattr(callback, c) for c in COUNTS if hasattr(callback, c)}, f"{name}.counts")


def file_entries(directory: Path) -> Iterator[tuple[str, str]]:
    """What training leaves on disk: incidents, bundles and checkpoints; else the names of the files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and "tfevents" not in path.name)
    for path in files:
        name = f"files.{path.relative_to(directory)}"
        if path.name == "incidents.jsonl":
            for index, line in enumerate(path.read_text().splitlines()):
                yield f"{name}.{index}", _without(json.loads(line), "time")
        elif path.suffix == ".json" and path.name != "manifest.json":
            yield name, _without(json.loads(path.read_text()), "time", "versions", "model")
        elif path.suffix == ".csv":
            yield name, _sha(path.read_bytes())
        elif path.suffix in (".pt", ".ckpt"):
            content = torch.load(path, map_location="cpu", weights_only=False)
            parts = content if isinstance(content, Mapping) else {"all": content}
            for key in sorted(parts, key=str):
                if key == "callbacks":  # one by one, since their keys tell where they write
                    yield from entries_of(parts[key], f"{name}.{key}")
                elif key != "pytorch-lightning_version":
                    yield f"{name}.{key}", digest_of(parts[key])
        else:  # pictures, and what tells of times
            yield name, "exists"


def _without(record: dict[str, Any], *keys: str) -> str:
    return json.dumps({key: value for key, value in record.items() if key not in keys}, sort_keys=True)


class Recorder(Logger):
    """Keeps all that is logged, histograms included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, list[str]]] = []
        self.scalars: dict[str, list[tuple[int | None, float]]] = {}
        self.raw_histograms: dict[str, list[Any]] = {}

    @property
    def name(self) -> str:
        return "fingerprint"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> Recorder:
        """What histograms are given to, as with TensorBoard's logger."""
        return self

    def add_histogram_raw(self, tag: str, **numbers: Any) -> None:
        self.raw_histograms.setdefault(tag, []).append(numbers)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, sorted(metrics)))
        for name, value in metrics.items():
            self.scalars.setdefault(name, []).append((step, float(value)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are no result of training."""

    def entries(self) -> Iterator[tuple[str, str]]:
        """A sum for each metric and each histogram, over all steps."""
        yield "log.calls", f"{len(self.calls)} calls {_sha(repr(self.calls).encode())}"
        for name, series in sorted(self.scalars.items()):
            yield f"log.{name}", f"{len(series)} values, last {series[-1]!r}, {_sha(repr(series).encode())}"
        for name, values in sorted(self.raw_histograms.items()):
            yield f"histogram.{name}", f"{len(values)} histograms {digest_of(values)}"


# ---- the laws' models


def _momentum(parameters: Any, **options: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, **options)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": _momentum,
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
    "momentum_fused": partial(_momentum, fused=True),
}


class Net(pl.LightningModule):
    """Batch normalization: float and integer buffers. The base of the others."""

    def __init__(self, optimizer: str = "momentum", scheduler: bool = False) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.build()

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if not self.scheduler:
            return optimizer
        return [optimizer], [{"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 20), "interval": "step"}]


class SparseNet(Net):
    """An embedding with sparse gradients, and a 0-dim parameter."""

    def build(self) -> None:
        self.embedding = nn.Embedding(16, 8, sparse=True)
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.nan_to_num(0.0, 0.0, 0.0).abs().mul(5).long().clamp(max=15)
        # A bad batch's poison comes in by a sum, since tokens can't be NaN.
        logits: Tensor = self.head(self.embedding(tokens).mean(1)) * self.temperature + (x * 0).sum()
        return logits

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05, momentum=0.9)


class TiedNet(Net):
    """Two layers that share a weight, a frozen one, and one that the loss does not use."""

    def build(self) -> None:
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.frozen(self.first(x)).tanh()))
        return logits


class BufferNet(Net):
    """A network that shields its loss from bad inputs, but not its buffer; another buffer is infinite on purpose."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 3))
        self.register_buffer("input_mean", torch.zeros(4))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.input_mean.lerp_(x.mean(0), 0.1)  # type: ignore[operator]
        logits: Tensor = self.net(x.nan_to_num(0.0, 0.0, 0.0))
        return logits


class Idle(Net):
    """A model that sometimes has nothing to learn: no loss, or one that depends on nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return None if batch_idx == 1 else loss * 0 if batch_idx == 2 else loss


class TwoOptimizers(Net):
    """Manual optimization: two networks, each with its optimizer, stepped in every batch."""

    def build(self) -> None:
        self.automatic_optimization = False
        self.one = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.two = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [OPTIMIZERS[self.optimizer](self.one.parameters()), SGD(self.two.parameters(), lr=0.2)]


class Residual(nn.Module):
    """A branch beside a skip connection, which initializations by depth look for."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x)
        return result


class DeepNet(Net):
    """What initializations tell apart: convolution, normalization, recurrence, residual branches, activations."""

    def build(self) -> None:
        self.conv = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
        self.rnn = nn.LSTM(4, 8, batch_first=True)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.conv(x[:, None]).mT)
        logits: Tensor = self.head(self.blocks(states[:, -1]))
        return logits


class ResumableLoader:
    """A loader whose place in the epoch can be saved, as an exact resume asks for."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self._next = self._start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        for index in range(start, len(self.batches)):
            self._next = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = state_dict["next"] % len(self.batches)


class Saver(pl.Callback):
    """Saves a checkpoint after some batches, counted over all epochs."""

    def __init__(self, dirpath: Path, after: int) -> None:
        self.path, self.after = dirpath / "saved.ckpt", after

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)


def make_batches(double: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(15)]
    return [(x.double(), y) for x, y in batches] if double else batches


# ---- the laws' runs

FAULTS = (
    Fault("input", "nan", steps=[2, 18]),
    Fault("gradient", "inf", steps=5),
    Fault("loss", 1e6, steps=[11, 12]),
    Fault("weight", "nan", steps=14),
)
MORE_FAULTS = (
    *FAULTS,
    Fault("activation", "nan", steps=20),
    Fault("optimizer_state", "nan", steps=22),
    Fault("buffer", "inf", steps=24),
    Fault("learning_rate", 30.0, steps=16),
    Fault("input", 1e4, probability=0.1),
)


def armed(
    directory: Path,
    faults: tuple[Fault, ...] = FAULTS,
    rule: Any = None,
    schedule: Schedule | None = None,
    storage: Any = "memory",
    max_rollbacks: int = 3,
    decoupled: bool = False,
    per: Any = "layer",
) -> list[pl.Callback]:
    """Every callback, set so that each has work to do in thirty steps."""
    return [
        FaultInjector(faults),
        GradientMonitor(per=per, every_n_steps=1, histogram_every_n_steps=7),
        GradientClipping(rule or [ValueClip(0.5), ZClip(warmup_steps=3, max_norm=0.3)]),
        StepGuard([NonFinite(), Spike(window=8, min_history=3, threshold=20.0)], max_skipped_share=0.9),
        StepGuard([InputRange(1e3)]),
        LRSchedule(schedule or WarmupCosine(warmup=4)),
        WeightPenalty(l1=1e-3, l2=1e-2, decoupled=decoupled),
        Rollback(
            every_n_steps=3,
            patience=2,
            lr_recovery_steps=6,
            storage=storage,
            max_rollbacks=max_rollbacks,
            dirpath=directory / "rollback",
        ),
        FlightRecorder(directory / "record", max_bundles=2),
    ]


def the_suite(directory: Path, kind: str, faults: tuple[Fault, ...] = FAULTS, **options: bool) -> list[pl.Callback]:
    """The suite as it is, with faults, a schedule and a penalty."""
    others = [WeightPenalty(l2=1e-2), FaultInjector(faults)]
    schedule = [] if options.get("schedule") else [LRSchedule(WarmupLinear(warmup=3))]
    return [*stability_suite(kind, **options), *schedule, *others]


def stopped(directory: Path) -> list[pl.Callback]:
    """A guard that ends training, since no batch is good."""
    return [
        FaultInjector(Fault("input", "nan", steps=range(4, 30))),
        StepGuard(max_consecutive_skips=5),
        FlightRecorder(directory / "record", save_batch=False, trace=False),
    ]


def initialized(policy: str, directory: Path) -> list[pl.Callback]:
    """Weights set by a policy, then the rest."""
    return [Initialization(POLICIES[policy](), verbose=False), *armed(directory, faults=FAULTS[:2])]


def fp16(init_scale: float = 1024.0) -> dict[str, Any]:
    """Mixed precision with a real loss scaler, which ``Trainer(precision="16-mixed")`` does not use on the CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))]}


@dataclass
class Law:
    """A run of a small model.

    Attributes:
        model: Makes the model.
        callbacks: Makes the callbacks, given a directory to write to.
        trainer: Makes further arguments of the Trainer.
        interrupt_after: If not None, a checkpoint is saved after this many batches, and training resumed from it.
    """

    model: Callable[[], pl.LightningModule] = Net
    callbacks: Callable[[Path], list[pl.Callback]] = armed
    trainer: Callable[[], dict[str, Any]] = dict
    interrupt_after: int | None = None


def laws() -> dict[str, Law]:
    """All runs of small models."""
    return {
        "bare": Law(callbacks=lambda directory: []),
        **_suites(),
        **_models(),
        **_ways(),
        **_rollbacks(),
        **_policies(),
        **_resumes(),
    }


def _suites() -> dict[str, Law]:
    found = {}
    for kind in ("mlp", "cnn", "rnn", "transformer"):
        found[f"suite/{kind}"] = Law(partial(Net, "adamw_foreach"), partial(the_suite, kind=kind))
        asked = partial(the_suite, kind=kind, faults=FAULTS[:2], initialize=True, schedule=True)
        found[f"suite/{kind}-asked"] = Law(partial(DeepNet, "adamw_fused"), asked)
    return found


def _models() -> dict[str, Law]:
    found = {}
    models: tuple[type[Net], ...] = (Net, SparseNet, TiedNet, BufferNet, Idle, TwoOptimizers, DeepNet)
    for model in models:
        found[f"model/{model.__name__}"] = Law(model)
        found[f"model/{model.__name__}-suite"] = Law(model, partial(the_suite, kind="mlp"))
    for model in (Net, TwoOptimizers):
        for optimizer in ("adamw_foreach", "adamw_fused"):
            everything = partial(armed, faults=MORE_FAULTS)
            found[f"faults/{model.__name__}-{optimizer}"] = Law(partial(model, optimizer), everything)
    for per in ("total", "layer", "parameter"):
        found[f"monitor/{per}"] = Law(callbacks=partial(armed, per=per, decoupled=True))
    return found


def _ways() -> dict[str, Law]:
    found = {f"optimizer/{optimizer}": Law(partial(Net, optimizer)) for optimizer in OPTIMIZERS}
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "accumulation": lambda: {"accumulate_grad_batches": 2, "max_epochs": 4},
        "bf16": lambda: {"precision": "bf16-mixed"},
        "double": lambda: {"precision": "64-true"},
        "fp16": fp16,
        "fp16-overflow": partial(fp16, 2.0**20),
        "fp16-accumulation": lambda: {**fp16(), "accumulate_grad_batches": 2, "max_epochs": 4},
        "cadence": lambda: {"log_every_n_steps": 4},
    }
    for way, trainer in ways.items():
        for optimizer in ("momentum", "adamw_fused"):
            found[f"{way}/{optimizer}"] = Law(partial(Net, optimizer), trainer=trainer)
    found["fp16/TwoOptimizers"] = Law(TwoOptimizers, trainer=fp16)
    found["trainer_clipping"] = Law(trainer=lambda: {"gradient_clip_val": 0.1})
    return found


def _rollbacks() -> dict[str, Law]:
    found = {}
    for optimizer in ("momentum", "adamw_fused"):
        net = partial(Net, optimizer)
        for storage in ("memory", "disk"):
            found[f"rollback/{storage}-{optimizer}"] = Law(net, partial(armed, storage=storage))
            ruin = (Fault("weight", "nan", steps=range(6, 28)),)
            given_up = partial(armed, storage=storage, faults=ruin, max_rollbacks=2)
            found[f"rollback/given-up-{storage}-{optimizer}"] = Law(net, given_up)
        found[f"stopped/{optimizer}"] = Law(net, stopped)
    for storage in ("memory", "disk"):
        found[f"rollback/{storage}-TwoOptimizers"] = Law(TwoOptimizers, partial(armed, storage=storage))
        found[f"rollback/{storage}-fp16"] = Law(callbacks=partial(armed, storage=storage), trainer=fp16)
    return found


def _policies() -> dict[str, Law]:
    found = {f"clip/{name}": Law(callbacks=partial(armed, rule=rule())) for name, rule in RULES.items()}
    found["clip/TwoOptimizers"] = Law(TwoOptimizers, partial(armed, rule=[AutoClip(), NormClip(0.2)]))
    for name, schedule in SCHEDULES.items():
        callbacks = partial(armed, schedule=schedule())
        found[f"schedule/{name}"] = Law(callbacks=callbacks)
    found["schedule/over-scheduler"] = Law(partial(Net, "momentum", True))
    for name in POLICIES:
        found[f"initialization/{name}"] = Law(DeepNet, partial(initialized, name))
    return found


def _resumes() -> dict[str, Law]:
    found = {}
    models: tuple[type[Net], ...] = (Net, TwoOptimizers)
    for model in models:
        for optimizer in ("momentum", "adamw_fused"):
            for after in (4, 21):  # before a rollback, and after it in the second epoch
                name = f"resume/{model.__name__}-{optimizer}-{after}"
                found[name] = Law(partial(model, optimizer), interrupt_after=after)
    found["resume/disk"] = Law(callbacks=partial(armed, storage="disk"), interrupt_after=17)
    found["resume/fp16"] = Law(trainer=fp16, interrupt_after=17)
    found["resume/scheduler"] = Law(partial(Net, "adamw_foreach", True), interrupt_after=17)
    accumulation = {"accumulate_grad_batches": 2, "max_epochs": 4}
    found["resume/accumulation"] = Law(trainer=lambda: accumulation, interrupt_after=12)
    return found


RULES: dict[str, Callable[[], ClipRule]] = {
    "NormClip": lambda: NormClip(0.3),
    "NormClip-scheduled": lambda: NormClip(WarmupLinear(warmup=0, end=0.1, total_steps=30)),
    "NormClip-inf": lambda: NormClip(0.1, norm_type=float("inf")),
    "ValueClip": lambda: ValueClip(0.05),
    "AGC": lambda: AGC(clip=0.02, exclude_last_layer=True),
    "AutoClip": lambda: AutoClip(percentile=30),
    "ZClip": lambda: ZClip(warmup_steps=3),
    "ZClip-mean": lambda: ZClip(warmup_steps=3, z_threshold=1.0, max_norm=None, mode="mean"),
    "AdaGC": lambda: AdaGC(warmup_steps=4),
    "PerGroup": lambda: PerGroup({"bias": None, r"net\.0": ValueClip(0.02), ".*": AutoClip(percentile=20)}),
}
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "WarmupCosine": lambda: WarmupCosine(warmup=0.2, end=0.1),
    "WarmupLinear": lambda: WarmupLinear(warmup=5, start=0.1),
    "WarmupStableDecay": lambda: WarmupStableDecay(warmup=3),
    "WarmupInverseSqrt": lambda: WarmupInverseSqrt(warmup=4),
    "WarmupConstant": lambda: WarmupConstant(warmup=6),
}
POLICIES: dict[str, Callable[[], Policy]] = {
    "Auto": Auto,
    "Xavier": Xavier,
    "Kaiming": Kaiming,
    "Orthogonal": Orthogonal,
    "Normal": lambda: Normal(std=0.02),
    "TruncNormal": lambda: TruncNormal(std=0.02),
    "DepthScaled": DepthScaled,
    "ZeroResidual": lambda: ZeroResidual(Auto()),
    "LSUV": LSUV,
    "Recurrent": lambda: Recurrent(forget_bias=1.0),
    "ByPattern": lambda: ByPattern({"conv": Kaiming(), ".*": Xavier()}),
}


def train_law(law: Law) -> dict[str, Entries]:
    """Train a small model, and once more from its checkpoint if one is asked for; the entries of each run by name."""
    with tempfile.TemporaryDirectory() as folder, _numbered_names():
        if law.interrupt_after is None:
            return {"": _train(law, Path(folder), [], None)}
        saver = Saver(Path(folder, "whole"), law.interrupt_after)
        whole = _train(law, Path(folder, "whole"), [saver], None)
        return {"/whole": whole, "/resumed": _train(law, Path(folder, "resumed"), [], saver.path)}


def _train(law: Law, directory: Path, others: list[pl.Callback], ckpt_path: Path | None) -> Entries:
    directory.mkdir(exist_ok=True)
    pl.seed_everything(0, verbose=False)
    arguments: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, **law.trainer()}
    recorder, model = Recorder(), law.model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=recorder,
        callbacks=[*law.callbacks(directory), *others],
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    loader = ResumableLoader(make_batches(arguments.get("precision") == "64-true"))
    end = "came to its end"
    with redirect_stdout(io.StringIO()):
        try:
            trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
        except Exception as error:  # noqa: BLE001  # a run that breaks is a difference, and others are still of interest
            end = f"{type(error).__name__}: {error}"
            if not isinstance(error, TrainingDivergedError):
                print(f"A run broke: {end}", file=sys.stderr)
    found = {"end": end, **dict(state_entries(model, trainer)), **dict(recorder.entries())}
    return _without_places({**found, **dict(file_entries(directory))}, directory)


def _numbered_names() -> AbstractContextManager[Any]:
    """Runs and temporary files draw names from the system; while it lasts, these are numbered from 0 instead."""
    numbers = count()
    return mock.patch("secrets.token_hex", lambda size=32: f"{next(numbers):0{2 * size}x}")


def _without_places(entries: Entries, directory: Path) -> Entries:
    """Leave out where the run was written, and lines of source."""
    return {
        name.replace(str(directory), "<dir>"): PLACE_IN_SOURCE.sub("<source>", text.replace(str(directory), "<dir>"))
        for name, text in entries.items()
    }


# ---- the recipes' runs


def train_recipe(recipe: str, scenario: str) -> dict[str, Entries]:
    """Train a scenario's seed 0 in a process of its own; the entries of each variant."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "benchmarks.fingerprint", "--inside", recipe, scenario, "--out"]
        done = subprocess.run(
            [*command, f"{folder}/entries.json"],
            check=False,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            output = done.stdout.decode(errors="replace")
            print(f"Recipe {recipe}, scenario {scenario}, broke:\n{output}", file=sys.stderr)
            return {"": {"end": output.strip().rpartition("\n")[2]}}
        found: dict[str, Entries] = json.loads(Path(folder, "entries.json").read_text())
        return found


def inside_recipe(recipe: str, scenario: str) -> dict[str, Entries]:
    """Run a recipe's command in this process, and keep what every ``Trainer.fit`` leaves."""
    fits: list[tuple[Entries, Recorder]] = []
    fit = pl.Trainer.fit

    def fit_and_keep(trainer: pl.Trainer, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        recorder = Recorder()
        trainer.loggers = [*trainer.loggers, recorder]
        end = "came to its end"
        try:
            fit(trainer, model, *args, **kwargs)
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
            raise
        finally:
            fits.append(({"end": end, **dict(state_entries(model, trainer))}, recorder))

    code: Any = None
    with tempfile.TemporaryDirectory() as folder, _numbered_names():
        pl.Trainer.fit = fit_and_keep  # type: ignore[assignment, method-assign]
        sys.argv = [recipe, "--scenario", scenario, "--seed", "0", "--output", folder]
        try:
            runpy.run_module(f"recipes.{recipe}", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
        finally:
            pl.Trainer.fit = fit  # type: ignore[method-assign]
        results = json.loads(Path(folder, "results.json").read_text())
        records = [path.parent for path in sorted(Path(folder).rglob("incidents.jsonl"))]
        incidents = {f"{path.parent.name}.{name}": text for path in records for name, text in file_entries(path)}
        found = {
            f"/{result['variant']}": _without_places(
                {**entries, **dict(recorder.entries()), "result": _without(result, "seconds")}, Path(folder)
            )
            for (entries, recorder), result in zip(fits, results, strict=True)
        }
        command = {"exit code": repr(code), **_without_places(incidents, Path(folder))}
        return {**found, "/command": command}


# ---- the command


def main() -> int:
    """Take a fingerprint, and write it or compare it."""
    arguments = _parse()
    if arguments.inside:
        arguments.out.write_text(json.dumps(inside_recipe(*arguments.inside)))
        return 0
    _be_quiet()
    torch.set_num_threads(1)
    before = None if arguments.against is None else json.loads(arguments.against.read_text())
    start = time.monotonic()
    versions, runs = _versions(), dict[str, Entries]()
    kept: dict[str, Entries] = {}
    if arguments.out is not None and arguments.out.exists() and arguments.only is not None:
        kept = json.loads(arguments.out.read_text())["runs"]
    for found in _take(arguments.only, arguments.jobs):
        runs |= found
        if arguments.out is not None:
            content = {"versions": versions, "runs": {**kept, **runs}}
            arguments.out.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(f"{len(runs)} runs in {time.monotonic() - start:.0f} s", file=sys.stderr)
    if before is None:
        return 0
    if before["versions"] != versions:
        print(f"Beware: made with other versions: {before['versions']}; now {versions}")
    wanted = {name: run for name, run in before["runs"].items() if _is_asked(name, arguments.only)}
    differences = list(compare(wanted, runs))
    print("\n".join(differences or [f"No difference in {len(runs)} runs."]))
    return 1 if differences else 0


def compare(before: dict[str, Entries], after: dict[str, Entries]) -> Iterator[str]:
    """What differs between two fingerprints, in lines to read."""
    for name in sorted(before.keys() | after.keys()):
        if name not in after or name not in before:
            yield f"{name}: {'no such run any more' if name in before else 'a new run'}"
            continue
        old, new = before[name], after[name]
        lines = [
            f"changed  {key}\n      {old[key]}\n      {new[key]}" for key in old if new.get(key, old[key]) != old[key]
        ]
        gone = [key for key in old if key not in new]
        added = [key for key in new if key not in old]
        for key in gone:
            twins = [each for each in added if new[each] == old[key]]
            twin = max(twins, key=partial(_likeness, key), default=None)
            if twin is None:
                lines.append(f"gone     {key}: {old[key]}")
            else:
                added.remove(twin)
                lines.append(f"renamed  {key} -> {twin}")
        lines += [f"added    {key}: {new[key]}" for key in added]
        if lines:
            yield "\n  ".join([f"{name}: {len(lines)} of {len(old)} entries", *lines])


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _take(only: str | None, jobs: int) -> Iterator[dict[str, Entries]]:
    """Make the runs, and yield each scenario's or model's as soon as they are done."""
    # The recipes train in processes of their own, meanwhile the small models in this one.
    scenarios = [(r, s) for r, names in RECIPES.items() for s in names if _is_asked(f"recipe/{r}/{s}", only)]
    with ThreadPoolExecutor(jobs) as pool:
        pending = [(pair, pool.submit(train_recipe, *pair)) for pair in scenarios]
        for name, law in laws().items():
            if _is_asked(f"law/{name}", only):
                yield {f"law/{name}{suffix}": entries for suffix, entries in train_law(law).items()}
        for (recipe, scenario), future in pending:
            yield {f"recipe/{recipe}/{scenario}{suffix}": entries for suffix, entries in future.result().items()}


def _is_asked(name: str, only: str | None) -> bool:
    return only is None or only in name


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "numpy": np.__version__,
    }


def _be_quiet() -> None:
    # Without matplotlib bundles hold no pictures, which would take nine tenths of the time. Recipes need it.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stability_callbacks"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("``")[0].strip(" :"))
    parser.add_argument("--out", type=Path, help="write to this file; with --only, the other runs in it are kept")
    parser.add_argument("--against", type=Path, help="compare with this file; the exit code is 1 if anything differs")
    parser.add_argument("--only", help="only runs whose name contains this: law, law/fp16, recipe/mlp/poisoned")
    parser.add_argument("--jobs", type=int, default=1, help="recipes that train at the same time (default: 1)")
    parser.add_argument("--inside", nargs=2, metavar=("RECIPE", "SCENARIO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is None and arguments.against is None:
        parser.error("one of --out and --against must be given")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
