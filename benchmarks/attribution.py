"""How much of a step is spent in our code: ``python -m benchmarks.attribution --help``.

Times the suite's part of each step from inside: everything between a hook being passed to our code and its return, over
the rest of the step. It sees no indirect cost, such as caches that our reads have filled, but it needs no second run to
compare with, so it is steady where a ratio of two runs drowns in the noise of a shared machine. Clipping by
``Trainer(gradient_clip_val=1.0)``, and ``grad_norm`` logged in each step, are measured the same way. All log to
TensorBoard at Lightning's default cadence.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector

from benchmarks._models import MODELS, Classifier, LogsGradNorm
from stability_callbacks import FlightRecorder, Rollback, StepGuard, stability_suite
from stability_callbacks.engine import StepLife, StepLifecycle

_LOG_EVERY = 50  # the Trainer's default

_OURS = [
    (StepLifecycle, ("begin_batch", "add_loss", "measure", "end_batch")),
    (StepLife, ("act", "_after_arithmetic")),
]
_THEIRS = [
    (Precision, ("clip_gradients",)),
    (LogsGradNorm, ("on_before_optimizer_step",)),
    (_LoggerConnector, ("update_train_step_metrics",)),
]


class Stopwatch:
    """Adds up the time spent in some methods; nested ones count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self, owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


class Batches:
    """Hands out one batch over and over and notes each step's time and the watched share of it."""

    def __init__(self, batch: Any, steps: int, stopwatch: Stopwatch) -> None:
        self.batch, self.steps, self.stopwatch = batch, steps, stopwatch
        self.shares: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Any:
        for _ in range(self.steps):
            self.stopwatch.seconds = 0.0
            start = time.perf_counter()
            yield self.batch
            whole = time.perf_counter() - start
            self.shares.append(self.stopwatch.seconds / (whole - self.stopwatch.seconds))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    stopwatch = Stopwatch()
    for owner, names in (*_OURS, *_THEIRS):
        for name in names:
            stopwatch.watch(owner, name)
    columns = "ordinary (quartiles)   at a log, histograms, snapshot   at default cadence"
    print(f"{'added to the rest of a step':43} {columns}")
    folder = tempfile.mkdtemp()
    for model in arguments.models:
        make_net, make_batch, kind = MODELS[model]
        arms: list[tuple[str, type[Classifier], list[Callback], float | None]] = [
            ("gradient_clip_val=1.0", Classifier, [], 1.0),
            ("grad_norm each step", LogsGradNorm, [], None),
            ("guard, recorder, rollback", Classifier, [StepGuard(), FlightRecorder(), Rollback()], None),
            ("suite", Classifier, stability_suite(kind), None),
            ("suite + schedule", Classifier, stability_suite(kind, schedule=True), None),
        ]
        for label, module_class, callbacks, clip in arms:
            torch.manual_seed(0)
            batches = Batches(make_batch(arguments.batch_size), 3 * _LOG_EVERY + 1, stopwatch)
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=TensorBoardLogger(folder, name=label.split("=")[0]),
                callbacks=callbacks,
                gradient_clip_val=clip,
                enable_progress_bar=False,
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            trainer.fit(module_class(make_net(), fused=False), batches)
            print(f"{model:16} {label:25} {_summary(batches.shares)}")


def _summary(shares: list[float]) -> str:
    """Ordinary steps, and those that log: the first also counts histograms, the second takes a snapshot."""
    histogram, snapshot, log = shares[_LOG_EVERY - 1 :: _LOG_EVERY]
    ordinary = [share for step, share in enumerate(shares) if step >= 5 and (step + 1) % _LOG_EVERY]
    low, median, high = statistics.quantiles(ordinary, n=4)
    # By default GradientMonitor counts histograms at one log step in ten, and Rollback takes a snapshot at one in two.
    mean = median + ((log - median) + (histogram - log) / 10 + (snapshot - log) / 2) / _LOG_EVERY
    return f"{median:7.1%} ({low:.1%} - {high:.1%})   {log:7.1%} {histogram:7.1%} {snapshot:7.1%}   {mean:7.1%}"


if __name__ == "__main__":
    main()
