"""How often `Spike` skips a step of a sound run: ``python -m benchmarks.false_alarms --help``.

The healed LSTM of the recipe and four small networks learn scikit-learn's digits without any fault, from several seeds,
under ``StepGuard([NonFinite(), Spike()])``. Every step that is skipped is a false alarm.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from benchmarks._digit_networks import NETWORKS, DigitClassifier
from benchmarks._digits import Digits
from recipes.models import PixelRNN
from stability_callbacks import FlightRecorder, GradientClipping, Initialization, LRSchedule, StepGuard
from stability_callbacks.clipping import NormClip
from stability_callbacks.detection import NonFinite, Spike
from stability_callbacks.diagnosis import read_incidents
from stability_callbacks.initialization import Recurrent
from stability_callbacks.schedules import WarmupCosine


def _recipe() -> L.LightningModule:
    return PixelRNN(torch.Size([64]), 10, partial(torch.optim.SGD, lr=0.5, momentum=0.9))


_MODELS: dict[str, Callable[[], L.LightningModule]] = {
    "recipes.lstm, healed": _recipe,
    **{name: partial(DigitClassifier, name) for name in NETWORKS},
}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(_MODELS), default=list(_MODELS), metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stability_callbacks"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)

    versions = f"torch {torch.__version__}, Lightning {L.__version__}"
    table = Table(
        title=f"False alarms of Spike(), {arguments.seeds} seeds of {arguments.steps} steps each",
        caption=f"{datetime.date.today()}, {versions}, {arguments.threads} threads",
    )
    for column in ("model", "steps", "skipped", "in which steps"):
        table.add_column(column, justify="right" if column in ("steps", "skipped") else "left")
    for model in arguments.models:
        alarms = [step for seed in range(arguments.seeds) for step in _alarms(model, seed, arguments.steps)]
        where = ", ".join(f"{step}" for step in sorted(Counter(alarms))[:12])
        table.add_row(model, str(arguments.seeds * arguments.steps), str(len(alarms)), where)
    Console(width=110).print(table)


def _alarms(model: str, seed: int, steps: int) -> list[int]:
    """The steps that were skipped."""
    L.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        guard = StepGuard([NonFinite(), Spike()])
        callbacks: list[Callback] = [
            LRSchedule(WarmupCosine(warmup=30)),
            GradientClipping(NormClip(1.0)),
            guard,
            FlightRecorder(folder, max_bundles=0),
        ]
        if model.startswith("recipes"):
            callbacks.append(Initialization(Recurrent(forget_bias=1.0), verbose=False))
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(_MODELS[model](), Digits(batch_size=32, seed=seed))
        record = Path(folder) / "incidents.jsonl"
        return [incident.step for incident in read_incidents(record)] if guard.skipped_steps else []


if __name__ == "__main__":
    main()
