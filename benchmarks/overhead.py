"""What the callbacks cost per step, as ratios to a bare Trainer: ``python -m benchmarks.overhead --help``.

All arms train the same network, each with its own Trainer in its own thread, and take turns step by step, so that a
busy moment of the machine hits all of them alike. Steps that log and steps that do not are timed apart; the cost of a
step is their mean at Lightning's default of one log in 50 steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import statistics
import tempfile
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
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name, (module_class, make_callbacks, trainer_arguments) in _ARMS.items():
            torch.manual_seed(0)
            module = module_class(make_net(), arguments.fused)
            loader = BatonLoader(batch, steps, per_turn)
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
    seconds = {name: loader.seconds for name, (loader, _) in zip(_ARMS, runs, strict=True)}
    return {
        name: {"parameters": parameters, **_ratio(times, seconds["bare"], per_turn)} for name, times in seconds.items()
    }


def _ratio(times: list[float], bare: list[float], per_turn: int) -> dict[str, float]:
    """Cost relative to the bare arm, paired turn by turn: median and quartiles."""
    if per_turn > 1:  # each turn holds one log step
        pairs = [t / b for t, b in zip(times, bare, strict=True)][_WARM_UP_LOGS:]
        return {"ms": 1e3 * statistics.median(times[_WARM_UP_LOGS:]), **_quartiles(pairs)}
    first = _WARM_UP_LOGS * _LOG_EVERY
    ordinary = [i for i in range(first, len(times)) if (i + 1) % _LOG_EVERY]
    logging_steps = [i for i in range(first, len(times)) if not (i + 1) % _LOG_EVERY]
    quartiles = _quartiles([times[i] / bare[i] for i in ordinary])
    usual, bare_usual = (statistics.median(t[i] for i in ordinary) for t in (times, bare))
    extra, bare_extra = (
        max(statistics.median(t[i] for i in logging_steps) - u, 0.0) / _DEFAULT_LOG_EVERY
        for t, u in ((times, usual), (bare, bare_usual))
    )
    # What log steps cost more, spread over a default log interval.
    surcharge = (extra - bare_extra) / bare_usual
    return {"ms": 1e3 * (usual + extra), **{name: value + surcharge for name, value in quartiles.items()}}


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"ratio": median, "low": low, "high": high}


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
    for column in ("ms per step", "ratio to bare", "quartiles"):
        table.add_column(column, justify="right")
    for name, figures in arms.items():
        quartiles = f"{figures['low']:.3f} - {figures['high']:.3f}"
        table.add_row(name, f"{figures['ms']:.2f}", f"{figures['ratio']:.3f}", quartiles)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
