"""Hundreds of faults of all kinds in one training run, with the callbacks and without: ``python -m benchmarks.soak``.

Each network learns scikit-learn's digits under guard, rollback, clipping, recorder and a moving average: several times
without a fault, from different seeds, and once with faults in random steps. And once for each kind of fault, with
exactly its faults, it does so without any of these; such a run ends when a weight is not finite.

A run has healed if nothing is non-finite at its end (parameters, buffers, optimizer state, average) and the test
accuracy, of the weights and of their average, is within the spread of the runs without a fault: not below their mean
less two standard deviations.

Faults that leave finite numbers in what stays, or hide behind normalization, may be silent: no loss or gradient tells
of them. They are shown apart, one kind a run, with the callbacks and without.

The first fault comes once the spike detector has seen enough steps to judge and the loss has left its steep early fall,
in which damage that leaves all numbers finite can't be told from learning; the last one comes so long before the end
that a rollback can still go its way.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks._digit_networks import NETWORKS, DigitClassifier
from benchmarks._digits import Digits
from stability_callbacks import (
    FaultInjector,
    FlightRecorder,
    GradientClipping,
    LRSchedule,
    Rollback,
    StepGuard,
    TrainingDivergedError,
)
from stability_callbacks.clipping import NormClip
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.engine import averaged_models
from stability_callbacks.faults import Fault, named_tensors
from stability_callbacks.schedules import WarmupCosine

__all__ = ["KINDS", "SILENT_KINDS", "Run", "draw_faults", "least_accuracy", "train"]

BATCH_SIZE = 32
WARMUP = 30
FIRST_FAULT = 100
LAST_FAULT = 40  # before the end

# kind: target and value of the fault
Kinds = dict[str, tuple[Any, Any]]

KINDS: Kinds = {
    "input nan": ("input", "nan"),
    "input inf": ("input", "inf"),
    "input x 1e4": ("input", 1e4),
    "activation nan": ("activation", "nan"),
    "activation inf": ("activation", "inf"),
    "gradient nan": ("gradient", "nan"),
    "gradient x 1e6": ("gradient", 1e6),
    "weight nan": ("weight", "nan"),
    "weight -inf": ("weight", "-inf"),
    "buffer nan": ("buffer", "nan"),
    "optimizer state nan": ("optimizer_state", "nan"),
    "optimizer state inf": ("optimizer_state", "inf"),
    "loss nan": ("loss", "nan"),
    "loss x 1e4": ("loss", 1e4),
    "learning rate x 1e3": ("learning_rate", 1e3),
}
SILENT_KINDS: Kinds = {
    "activation x 1e4": ("activation", 1e4),
    "weight x 0": ("weight", 0.0),
    "weight x 1e3": ("weight", 1e3),
    "buffer x 1e4": ("buffer", 1e4),
    "optimizer state x 1e4": ("optimizer_state", 1e4),
}


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        accuracy: Test accuracy of the final weights.
        averaged_accuracy: Test accuracy of their exponential moving average; None if there was none.
        nonfinite: Names of what was not finite at the end: of parameters, buffers, optimizer state and average.
        died_at: The step that left a weight non-finite, in a run without protection; None if none did.
        faults: Number of faults put in.
        skipped_steps: Steps that the guard skipped.
        rollbacks: How often training went back to a snapshot.
        seconds: Wall time of the training.
        stopped: Why the callbacks ended it early; None if they did not.
    """

    accuracy: float
    averaged_accuracy: float | None
    nonfinite: list[str]
    died_at: int | None
    faults: int
    skipped_steps: int
    rollbacks: int
    seconds: float
    stopped: str | None = None

    @property
    def lower_accuracy(self) -> float:
        """The lower one of the two accuracies."""
        return self.accuracy if self.averaged_accuracy is None else min(self.accuracy, self.averaged_accuracy)


def draw_faults(
    count: int, steps: int, seed: int = 0, kinds: Kinds = KINDS, first: int = FIRST_FAULT
) -> dict[str, Fault]:
    """Faults of all kinds, as many of each, in steps drawn without repetition.

    Args:
        count: Number of faults; rounded up to a multiple of the number of kinds.
        steps: Length of the run.
        seed: Seed of the draw.
        kinds: Which kinds.
        first: The first step that one may hit.

    Returns:
        The faults by kind.
    """
    stream = random.Random(seed)
    each = -(-count // len(kinds))
    drawn = stream.sample(range(first, steps - LAST_FAULT), each * len(kinds))
    return {
        kind: Fault(target, value, steps=sorted(drawn[index * each : (index + 1) * each]), seed=seed)
        for index, (kind, (target, value)) in enumerate(kinds.items())
    }


def protection(directory: Path) -> list[Callback]:
    """The callbacks that are on trial, set for a fault in every fifth step or so.

    Snapshots are taken every five steps, so that a rollback loses little, and the learning rate, which is not to blame,
    is left as it is. One bundle must do: each takes a second, most of it for its picture.
    """
    return [
        StepGuard([NonFinite(), Spike(), InputRange(50)]),
        Rollback(every_n_steps=5, keep=3, patience=3, lr_factor=1.0, lr_recovery_steps=0, max_rollbacks=20),
        GradientClipping(NormClip(1.0)),
        FlightRecorder(directory, max_bundles=1),
        EMAWeightAveraging(decay=0.98),
    ]


def train(name: str, steps: int, seed: int, faults: Sequence[Fault] = (), protected: bool = True) -> Run:
    """Train one of the networks.

    Args:
        name: One of ``NETWORKS``.
        steps: Number of steps.
        seed: Seed of the weights and the batches.
        faults: What goes wrong.
        protected: Whether the callbacks are there to help. If not, the run ends when a weight is not finite.
    """
    L.seed_everything(seed, verbose=False)
    module, data = DigitClassifier(name), Digits(BATCH_SIZE, seed)
    injectors, end = [FaultInjector(faults)] if faults else [], FinalState(stop_if_dead=not protected)
    with tempfile.TemporaryDirectory() as directory, _quiet():
        guards = protection(Path(directory)) if protected else []
        callbacks = [end, *injectors, LRSchedule(WarmupCosine(WARMUP, total_steps=steps)), *guards]
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started, stopped = time.perf_counter(), None
        try:
            trainer.fit(module, data)
        except TrainingDivergedError as error:
            stopped = str(error)
        seconds = time.perf_counter() - started
    averaged = _accuracy(module, data) if protected and stopped is None else None
    module.load_state_dict(end.weights)
    return Run(
        accuracy=_accuracy(module, data),
        averaged_accuracy=averaged,
        nonfinite=end.nonfinite,
        died_at=end.died_at,
        faults=sum(len(injector.injected) for injector in injectors),
        skipped_steps=sum(guard.skipped_steps for guard in guards if isinstance(guard, StepGuard)),
        rollbacks=sum(guard.rollbacks for guard in guards if isinstance(guard, Rollback)),
        seconds=seconds,
        stopped=stopped,
    )


def least_accuracy(clean: Sequence[Run]) -> float:
    """The accuracy that a run must reach to be one like those without faults: their mean less two standard deviations.

    Args:
        clean: At least two runs.
    """
    accuracies = [run.accuracy for run in clean]
    return statistics.fmean(accuracies) - 2 * statistics.stdev(accuracies)


def has_healed(run: Run, least: float) -> bool:
    """Whether nothing is non-finite and the accuracy of the weights and of their average is at least the given one."""
    return run.stopped is None and not run.nonfinite and run.lower_accuracy >= least


class FinalState(Callback):
    """Looks at everything when training ends, before an average takes the place of the weights."""

    def __init__(self, stop_if_dead: bool) -> None:
        self.stop_if_dead = stop_if_dead
        self.weights: dict[str, Tensor] = {}
        self.nonfinite: list[str] = []
        self.died_at: int | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.stop_if_dead and not all(bool(weight.isfinite().all()) for weight in pl_module.parameters()):
            self.died_at = trainer.global_step - 1
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = deepcopy(pl_module.state_dict())
        state = {
            "model": self.weights,
            "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
            "averages": [average.state_dict() for average in averaged_models(trainer)],
        }
        self.nonfinite = [name for name, tensor in named_tensors(state, "state") if not bool(tensor.isfinite().all())]


@torch.no_grad()
def _accuracy(module: DigitClassifier, data: Digits) -> float:
    images, labels = data.test.tensors
    return float((module.eval()(images).argmax(1) == labels).float().mean())


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- the measurement


@dataclass(frozen=True)
class Figures:
    """All runs of a network.

    Attributes:
        clean: Without faults, by seed.
        soak: With all kinds of faults.
        least: The accuracy to reach.
        healed: Whether the soak did.
        unprotected: Without the callbacks, by kind of fault.
        silent: With the faults that may be silent, by kind: with the callbacks and without.
    """

    clean: list[Run]
    soak: Run
    least: float
    healed: bool
    unprotected: dict[str, Run]
    silent: dict[str, tuple[Run, Run]]


def measure(name: str, arguments: argparse.Namespace, advance: Callable[[], None]) -> Figures:
    """Do all runs of a network."""

    def run(seed: int = 0, faults: Sequence[Fault] = (), protected: bool = True) -> Run:
        finished = train(name, arguments.steps, seed, faults, protected)
        advance()
        return finished

    faults = draw_faults(arguments.faults, arguments.steps, first=arguments.first_fault)
    each = -(-arguments.faults // len(KINDS))
    silent = draw_faults(each * len(SILENT_KINDS), arguments.steps, kinds=SILENT_KINDS, first=arguments.first_fault)
    clean = [run(seed) for seed in range(arguments.seeds)]
    least, soak = least_accuracy(clean), run(faults=list(faults.values()))
    return Figures(
        clean,
        soak,
        least,
        has_healed(soak, least),
        {kind: run(faults=[fault], protected=False) for kind, fault in faults.items()},
        {kind: (run(faults=[fault]), run(faults=[fault], protected=False)) for kind, fault in silent.items()},
    )


def main() -> int:
    """Measure, print tables, and write the figures as JSON where asked; the exit code says whether all runs healed."""
    arguments = _parse()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the denormal gradients of a ruined network cost a CPU five times the time
    runs = arguments.seeds + 1 + len(KINDS) + 2 * len(SILENT_KINDS)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=runs * len(arguments.models))
        figures = {name: measure(name, arguments, partial(progress.advance, task)) for name in arguments.models}
    machine = _machine(arguments)
    _print(figures, machine)
    if arguments.json:
        content = {**machine, "figures": {name: asdict(each) for name, each in figures.items()}}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(each.healed for each in figures.values()) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("``")[0].strip(" :"))
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--faults", type=int, default=200, help="in the one run with all kinds, rounded up")
    parser.add_argument("--seeds", type=int, default=5, help="runs without faults, at least 2")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first-fault", type=int, default=300, help="the first step that a fault may hit")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a spread takes at least 2 --seeds")
    if arguments.steps - arguments.first_fault - LAST_FAULT < arguments.faults + len(KINDS):
        parser.error("so many --faults do not fit into so few --steps")
    return arguments


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "python": platform.python_version(),
        "arguments": vars(arguments),
    }


# ---- the tables


def _print(figures: dict[str, Figures], machine: dict[str, Any]) -> None:
    console = Console(width=130)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "lightning", "python"))
    steps = machine["arguments"]["steps"]
    console.print(f"{machine['date']}, {machine['device']}, one thread, {versions}; {steps} steps a run")
    console.print(_soak_table(figures))
    console.print(_damage_table(figures))
    console.print(_silent_table(figures))


def _soak_table(figures: dict[str, Figures]) -> Table:
    seeds = len(next(iter(figures.values())).clean)
    table = Table(title=f"All kinds of faults in one run, with the callbacks; {seeds} runs without faults")
    table.add_column("")
    for column in (
        "faults",
        "skipped",
        "rollbacks",
        "not finite",
        "accuracy",
        "averaged",
        "without faults",
        "at least",
        "healed",
    ):
        table.add_column(column, justify="right")
    for name, each in figures.items():
        accuracies = [run.accuracy for run in each.clean]
        false_skips = sum(run.skipped_steps for run in each.clean)
        soak = each.soak
        table.add_row(
            name,
            str(soak.faults),
            str(soak.skipped_steps),
            str(soak.rollbacks),
            str(len(soak.nonfinite)),
            f"{soak.accuracy:.3f}",
            "-" if soak.averaged_accuracy is None else f"{soak.averaged_accuracy:.3f}",
            f"{min(accuracies):.3f} - {max(accuracies):.3f}, {false_skips} skips",
            f"{each.least:.3f}",
            "yes" if each.healed else "NO",
        )
    return table


def _damage_table(figures: dict[str, Figures]) -> Table:
    table = Table(title="Faults of one kind, without the callbacks: test accuracy")
    table.add_column("kind")
    for name in figures:
        table.add_column(name)
    for kind in KINDS:
        table.add_row(kind, *(_damage(each.unprotected[kind], each.least) for each in figures.values()))
    return table


def _silent_table(figures: dict[str, Figures]) -> Table:
    table = Table(title="Faults that may be silent, one kind a run: test accuracy without the callbacks, and with them")
    table.add_column("kind")
    for name in figures:
        table.add_column(name)
    for kind in SILENT_KINDS:
        cells = []
        for each in figures.values():
            protected, unprotected = each.silent[kind]
            healed = "healed" if has_healed(protected, each.least) else "NOT healed"
            cells.append(f"{unprotected.accuracy:.3f}, {protected.lower_accuracy:.3f} {healed}")
        table.add_row(kind, *cells)
    return table


def _damage(run: Run, least: float) -> str:
    if run.died_at is not None:
        return f"{run.accuracy:.3f}, ruined in step {run.died_at}"
    if run.nonfinite:
        return f"{run.accuracy:.3f}, not finite"
    return f"{run.accuracy:.3f}" + ("" if run.accuracy >= least else ", worse")


if __name__ == "__main__":
    raise SystemExit(main())
