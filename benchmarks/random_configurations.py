"""Laws 2 and 3 on random trainings: ``python -m benchmarks.random_configurations --cases 300 --seed 0``.

Each case draws a model, an optimizer (torch's, and those of other packages that are installed), a precision, a window
of accumulation, automatic or manual optimization, what ``training_step`` does besides, and where bad batches come. Then

- law 2: the run with a recorder and a monitor has the same weights, bit for bit, as the one without them, whatever the
  training step does besides;
- law 3: the run with bad windows ends, bit for bit, as the one without them: parameters, buffers, optimizer state and
  parameter groups.

Prints each case that breaks a law, with the seed that draws it again, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stability_callbacks import FlightRecorder, GradientClipping, GradientMonitor, StepGuard
from stability_callbacks.clipping import AdaGC, AutoClip, NormClip, ValueClip, ZClip

Batch = tuple[Tensor, Tensor]
Make = Callable[[Any], torch.optim.Optimizer]

_MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
}

_OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


def _of_other_packages() -> Iterator[tuple[str, Make]]:
    if find_spec("schedulefree"):
        import schedulefree

        yield "schedule-free", lambda p: schedulefree.SGDScheduleFree(p, lr=0.1)
    if find_spec("prodigyopt"):
        import prodigyopt

        yield "Prodigy", prodigyopt.Prodigy
    if find_spec("lion_pytorch"):
        import lion_pytorch

        yield "Lion", lambda p: lion_pytorch.Lion(p, lr=1e-3)
    if find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        for name in ("AdaBelief", "Adai", "Lamb", "Adan"):
            yield name, lambda p, name=name: getattr(pytorch_optimizer, name)(p, lr=0.01)  # type: ignore[misc]


_RULES: dict[str, Callable[[], Any]] = {
    "none": list,
    "norm": lambda: [GradientClipping(NormClip(0.5))],
    "value": lambda: [GradientClipping(ValueClip(0.1))],
    "z-score": lambda: [GradientClipping(ZClip(warmup_steps=3))],
    "adaptive": lambda: [GradientClipping([AdaGC(warmup_steps=3), AutoClip(50.0, window=8)])],
}

_COUNTER = {"calls": 0}


class Model(pl.LightningModule):
    """A small classifier whose training step does something besides."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.automatic_optimization = not case.manual
        self.net = _MODELS[case.model]()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.generator = torch.Generator().manual_seed(1)
        self.python = random.Random(1)
        self.more = iter([torch.full((), 0.01 * place) for place in range(10_000)])
        self.seen: list[Tensor] = []
        _COUNTER["calls"] = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y) * self._besides(x)
        if not self.case.manual:
            return loss
        optimizer: Any = self.optimizers()
        if batch_idx % self.case.window == 0:
            optimizer.zero_grad()
        self.manual_backward(loss / self.case.window)
        if batch_idx % self.case.window == self.case.window - 1:
            optimizer.step()
        return None

    def on_train_start(self) -> None:
        optimizer: Any = self.trainer.optimizers[0]
        if hasattr(optimizer, "train"):  # schedule-free ones want to be told
            optimizer.train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return dict((*_OPTIMIZERS.items(), *_of_other_packages()))[self.case.optimizer](self.net.parameters())

    def _besides(self, x: Tensor) -> Tensor | float:
        """Change something, and give a factor that depends on it."""
        kind = self.case.besides
        if kind == "teacher":
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
                told: Tensor = self.teacher(torch.nan_to_num(x))
                return 1 + 0.1 * told.float().tanh().mean()
        if kind == "generator":
            return 1 + 0.1 * torch.rand((), generator=self.generator)
        if kind == "iterator":
            return 1 + next(self.more)
        if kind == "python":
            return 1 + 0.1 * self.python.random()
        if kind == "list":
            self.seen.append(torch.nan_to_num(x).mean().detach())
            return 1 + 0.01 * len(self.seen)
        if kind == "global":
            _COUNTER["calls"] += 1
            return 1 + 0.01 * _COUNTER["calls"]
        return 1.0


@dataclass(frozen=True)
class Case:
    """What was drawn."""

    model: str
    optimizer: str
    precision: str
    window: int
    manual: bool
    besides: str
    rule: str
    fault: str
    places: tuple[int, ...]  # before which of the good windows a bad one comes
    bad_micro_batch: int

    @classmethod
    def drawn(cls, seed: int) -> Case:
        """Draw a case."""
        draw = random.Random(seed)
        window = draw.choice([1, 1, 2, 3])
        return cls(
            model=draw.choice(list(_MODELS)),
            optimizer=draw.choice([*_OPTIMIZERS, *(name for name, _ in _of_other_packages())]),
            precision=draw.choice(["32-true", "32-true", "bf16-mixed", "16-mixed", "64-true"]),
            window=window,
            manual=draw.random() < 0.3,
            besides=draw.choice(["nothing", "teacher", "generator", "iterator", "python", "list", "global"]),
            rule=draw.choice(list(_RULES)),
            fault=draw.choice(["nan", "inf", "-inf", "one nan"]),
            places=tuple(sorted(draw.sample(range(1, 9), draw.choice([1, 2, 3])))),
            bad_micro_batch=draw.randrange(window),
        )


def check(seed: int) -> list[str]:
    """Train a case in all ways that the laws compare.

    Args:
        seed: What draws the case.

    Returns:
        The laws that it breaks, in words.
    """
    case = Case.drawn(seed)
    broken = []
    bad = _batches(case, faulty=True)
    clipping = _RULES[case.rule]
    guarded = _train(case, bad, [*clipping(), StepGuard()])
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(None):
        observers: list[Callback] = [FlightRecorder(directory), GradientMonitor(histograms=False)]
        observed = _train(case, bad, [*clipping(), StepGuard(), *observers])
    if not _same(guarded, observed):
        broken.append(f"law 2, observers are invisible: {case}")
    if case.besides in ("nothing", "teacher") and not _same(guarded, _train(case, _batches(case), clipping())):
        broken.append(f"law 3, a skip is a perfect no-op: {case}")
    return broken


def _batches(case: Case, faulty: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if case.precision == "64-true" else torch.float32

    def batch() -> Batch:
        x = torch.randn(8, 6, generator=generator, dtype=dtype)
        return x, torch.randint(3, (8,), generator=generator)

    good = [[batch() for _ in range(case.window)] for _ in range(9)]
    windows = []
    for place, window in enumerate(good):
        if faulty and place in case.places:
            spoiled = [(x.clone(), y) for x, y in window]
            values = spoiled[case.bad_micro_batch][0]
            if case.fault == "one nan":
                values[0, 0] = float("nan")
            else:
                values.fill_(float(case.fault))
            windows.append(spoiled)
        windows.append(window)
    return [each for window in windows for each in window]


def _train(case: Case, batches: list[Batch], callbacks: list[Callback]) -> Any:
    torch.manual_seed(0)
    model = Model(case)
    plugins: Any = []
    if case.precision == "16-mixed":
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=None if plugins else case.precision,  # type: ignore[arg-type]
        plugins=plugins,
        accumulate_grad_batches=1 if case.manual else case.window,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader)
    [optimizer] = trainer.optimizers
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return model.state_dict(), optimizer.state_dict()["state"], groups


def _same(one: Any, other: Any) -> bool:
    """Whether two nestings hold the same bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or (one != one and other != other))


def main() -> int:
    """Check many cases and print those that break a law."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed; the others follow")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("stability_callbacks").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    broken = 0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        for text in check(seed):
            broken += 1
            print(f"seed {seed}: {text}")
    print(f"{arguments.cases} cases from seed {arguments.seed}: {broken} broken laws")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
