"""What the callbacks cost per step, as ratios to a bare Trainer: ``python -m benchmarks.overhead --help``.

All arms train the same network, each with its own Trainer in its own thread, and take turns step by step, so that a
busy moment of the machine hits all of them alike. On the CPU the time is that which the training thread had a
processor for; on a GPU it is the wall's. Each step is compared with the bare arm's step in the same turn. Steps that
log and those that do not are compared apart: the ratio is that of those that do not, plus a fiftieth of what log steps
cost more (Lightning's default cadence). The interval holds 90 % of the ratio's bootstrap distribution over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from benchmarks._interleaved import BatonLoader, take_turns
from benchmarks._models import MODELS, Classifier, LogsGradNorm
from stability_callbacks import GradientClipping, GradientMonitor, LRSchedule, StepGuard, stability_suite
from stability_callbacks.clipping import NormClip
from stability_callbacks.schedules import WarmupCosine

_LOG_EVERY = 10  # more often than the default, to time enough log steps
_DEFAULT_LOG_EVERY = 50
_WARM_UP_LOGS = 2
_RESAMPLES = 1000

# name: module class, callbacks for a kind of model, Trainer arguments
Arm = tuple[type[Classifier], Callable[[str], list[Callback]], dict[str, Any]]
_ARMS: dict[str, Arm] = {
    "bare": (Classifier, lambda kind: [], {}),
    "bare again (noise floor)": (Classifier, lambda kind: [], {}),
    "gradient_clip_val=1.0": (Classifier, lambda kind: [], {"gradient_clip_val": 1.0}),
    "grad_norm logged each step": (LogsGradNorm, lambda kind: [], {}),
    "GradientMonitor": (Classifier, lambda kind: [GradientMonitor()], {}),
    "GradientClipping": (Classifier, lambda kind: [GradientClipping(NormClip(1.0))], {}),
    "StepGuard": (Classifier, lambda kind: [StepGuard()], {}),
    "LRSchedule": (Classifier, lambda kind: [LRSchedule(WarmupCosine())], {}),
    "stability_suite": (Classifier, stability_suite, {}),
    "stability_suite + schedule": (Classifier, lambda kind: stability_suite(kind, schedule=True), {}),
}


def main() -> None:
    """Measure, print a table, and write the figures as JSON where asked."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures = {model: _measure(model, arguments) for model in arguments.models}
    for model, arms in figures.items():
        _print(model, arms)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**_machine(arguments), "figures": figures}, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=list(_ARMS), default=list(_ARMS), metavar="ARM")
    parser.add_argument("--logs", type=int, default=6, help=f"log steps timed per arm, one in {_LOG_EVERY} steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--fused", action="store_true", help="use the fused AdamW")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0 for torch's default")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def _measure(model: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train all arms in turns; the seconds of each arm's steps become ratios to the bare arm's."""
    make_net, make_batch, kind = MODELS[model]
    batch = make_batch(arguments.batch_size)
    # On a GPU a turn is one log interval; on the CPU one step.
    per_turn = _LOG_EVERY if arguments.device == "cuda" else 1
    steps = (_WARM_UP_LOGS + arguments.logs) * _LOG_EVERY
    names = list(dict.fromkeys(["bare", *arguments.arms]))
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in names:
            module_class, make_callbacks, trainer_arguments = _ARMS[name]
            torch.manual_seed(0)
            module = module_class(make_net(), arguments.fused)
            clock = time.perf_counter if arguments.device == "cuda" else time.thread_time
            loader = BatonLoader(batch, steps, per_turn, clock)
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="gpu" if arguments.device == "cuda" else "cpu",
                devices=1,
                logger=TensorBoardLogger(folder, name=name.split("=")[0]),
                log_every_n_steps=_LOG_EVERY,
                callbacks=make_callbacks(kind),
                enable_progress_bar=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                **trainer_arguments,
            )
            runs.append((loader, partial(trainer.fit, module, loader)))
        take_turns(runs)
    parameters = sum(parameter.numel() for parameter in make_net().parameters())
    seconds = {name: loader.seconds for name, (loader, _) in zip(names, runs, strict=True)}
    return {
        name: {"parameters": parameters, **_ratio(times, seconds["bare"], per_turn)} for name, times in seconds.items()
    }


def _ratio(times: list[float], bare: list[float], per_turn: int) -> dict[str, float]:
    """Cost relative to the bare arm's step in the same turn: the median, with a bootstrap interval of it."""
    first = _WARM_UP_LOGS * _LOG_EVERY // per_turn
    logs = [turn for turn in range(first, len(times)) if (turn + 1) * per_turn % _LOG_EVERY == 0]
    others = [turn for turn in range(first, len(times)) if (turn + 1) * per_turn % _LOG_EVERY] or logs

    def ratio(others: list[int], logs: list[int]) -> float:
        usual, log = (statistics.median(times[turn] / bare[turn] for turn in turns) for turns in (others, logs))
        return usual + (log - usual) / _DEFAULT_LOG_EVERY

    generator = random.Random(0)
    resampled = sorted(
        ratio(generator.choices(others, k=len(others)), generator.choices(logs, k=len(logs))) for _ in range(_RESAMPLES)
    )
    return {
        "ms": 1e3 * statistics.median(times[turn] for turn in others),
        "ratio": ratio(others, logs),
        "low": resampled[_RESAMPLES // 20],
        "high": resampled[-_RESAMPLES // 20],
    }


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "python": platform.python_version(),
        "arguments": vars(arguments),
    }


def _print(model: str, arms: dict[str, dict[str, float]]) -> None:
    parameters = next(iter(arms.values()))["parameters"]
    table = Table(title=f"{model}, {parameters / 1e6:.1f} M parameters")
    table.add_column("arm")
    for column in ("ms per step", "ratio to bare", "90 % interval"):
        table.add_column(column, justify="right")
    for name, figures in arms.items():
        interval = f"{figures['low']:.3f} - {figures['high']:.3f}"
        table.add_row(name, f"{figures['ms']:.2f}", f"{figures['ratio']:.3f}", interval)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
