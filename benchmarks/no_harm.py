"""Whether the suite's defaults leave sound runs as good as they were: ``python -m benchmarks.no_harm --help``.

Each of the sound runs is trained from several seeds, plain and with ``stability_suite(kind)``, from the same weights on
the same batches; with the observers alone, which must not change a bit; and with the clipping that the suite had before
this was measured. Rows that are finished are kept in ``runs/no_harm/rows.jsonl`` and not computed again while the
settings they depend on are the same, so that the command can be stopped, and parts of it can run side by side.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from scipy.stats import t as student

from benchmarks import _sound_runs
from benchmarks._sound_runs import GAN, SOUND_RUNS, SoundRun
from stability_callbacks import FlightRecorder, GradientClipping, GradientMonitor, Rollback, StepGuard, stability_suite
from stability_callbacks.clipping import AGC, ClipRule, NormClip

__all__ = ["ARMS", "Comparison", "Row", "compare", "table", "train"]

ARMS = ("plain", "suite", "observers", "former")
_ROWS = Path("runs/no_harm/rows.jsonl")


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        settings: What the outcome depends on besides run, seed and arm.
        score: The metric on the test data.
        weights: A hash of all parameters and buffers after training.
        clipped: Share of the optimizer steps that were clipped, as the suite logs it; 0 in the other arms.
        incidents: Lines of the flight record.
    """

    run: str
    seed: int
    arm: str
    settings: str
    score: float
    weights: str
    clipped: float
    skipped: int
    rollbacks: int
    incidents: int
    seconds: float


class Comparison(NamedTuple):
    """A run with and without the suite, over all seeds.

    Attributes:
        effect: Mean of the paired differences; above 0 the suite is better, whatever the metric.
        low: Lower end of the effect's 95 % interval, by Student's t.
        high: Upper end.
        noise: Standard deviation of the plain runs over the seeds.
    """

    effect: float
    low: float
    high: float
    noise: float

    @property
    def worse(self) -> bool:
        """Whether the suite did harm: by more than the seeds' noise, or by less but certainly."""
        return self.effect < -self.noise or self.high < 0

    @property
    def verdict(self) -> str:
        if not self.worse:
            return "no worse"
        return "**worse**" if self.effect < -self.noise else "worse, within the noise"


class ClippedSteps(DummyLogger):
    """Keeps the share of clipped steps of each log interval and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.shares += [value for name, value in metrics.items() if name.startswith("stability/clipped_fraction")]


def compare(plain: Sequence[float], other: Sequence[float], higher_is_better: bool) -> Comparison:
    """Compare paired scores, one pair a seed."""
    sign = 1 if higher_is_better else -1
    differences = [sign * (after - before) for before, after in zip(plain, other, strict=True)]
    effect = statistics.fmean(differences)
    half = 0.0
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        half = float(student.ppf(0.975, len(differences) - 1)) * error
    return Comparison(effect, effect - half, effect + half, statistics.stdev(plain) if len(plain) > 1 else 0.0)


def train(name: str, seed: int, arm: str) -> Row:
    """Train one run under one arm."""
    run, callbacks = SOUND_RUNS[name], _callbacks(SOUND_RUNS[name].kind, arm)
    log = ClippedSteps()
    L.seed_everything(seed, verbose=False)
    module, data = run.module(), run.data(seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=run.steps * (2 if isinstance(module, GAN) else 1),
            max_epochs=-1,
            limit_val_batches=0,
            accelerator="cpu",
            logger=log if arm == "suite" else False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
        incidents = sum(len(path.read_text().splitlines()) for path in Path(folder).rglob("incidents.jsonl"))
    seconds = time.perf_counter() - start
    return Row(
        run=name,
        seed=seed,
        arm=arm,
        settings=_settings(run, arm),
        score=module.score(data),
        weights=_hash(module),
        clipped=statistics.fmean(log.shares) if log.shares else 0.0,
        skipped=sum(callback.skipped_steps for callback in callbacks if isinstance(callback, StepGuard)),
        rollbacks=sum(callback.rollbacks for callback in callbacks if isinstance(callback, Rollback)),
        incidents=incidents,
        seconds=round(seconds, 2),
    )


def _callbacks(kind: str, arm: str) -> list[Callback]:
    if arm == "plain":
        return []
    if arm == "observers":
        return [GradientMonitor(), FlightRecorder()]
    if arm == "suite":
        return stability_suite(kind)
    rules: list[ClipRule] = [AGC(exclude_last_layer=True)] if kind == "cnn" else []
    return [GradientClipping([*rules, NormClip(1.0)]), StepGuard()]


def _settings(run: SoundRun, arm: str) -> str:
    """Changes whenever rows that were computed before are of no more use."""
    runs = hashlib.sha256(Path(_sound_runs.__file__).read_bytes()).hexdigest()[:12]
    rules = [repr(callback.rules) for callback in _callbacks(run.kind, arm) if isinstance(callback, GradientClipping)]
    return f"runs {runs}, torch {torch.__version__}, clipping {rules}"


def _hash(module: L.LightningModule) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[tuple[str, int, str, str], Row]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.run, row.seed, row.arm, row.settings): row for row in rows}


def table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The markdown table of all runs whose arms are finished for all seeds."""
    by_key = {(row.run, row.seed, row.arm): row for row in rows}
    head = ["run", "metric", "plain", "with the suite", "effect (+: better), 95 % interval", "seeds' noise", "verdict"]
    head += ["steps clipped", "skipped, rolled back", "observers alone", "former defaults: effect"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, run in SOUND_RUNS.items():
        of_arm = {
            arm: [by_key[name, seed, arm] for seed in seeds]
            for arm in ARMS
            if all((name, seed, arm) in by_key for seed in seeds)
        }
        if not {"plain", "suite"} <= set(of_arm):
            continue
        plain, suite = of_arm["plain"], of_arm["suite"]
        result = _compare_rows(run, plain, suite)
        cells = [name, run.metric, _spread(plain), _spread(suite), _interval(result), _number(result.noise)]
        cells += [result.verdict, f"{statistics.fmean(row.clipped for row in suite):.2%}"]
        cells += [f"{sum(row.skipped for row in suite)}, {sum(row.rollbacks for row in suite)}"]
        cells += [_observed(plain, of_arm["observers"]) if "observers" in of_arm else ""]
        former = _compare_rows(run, plain, of_arm["former"]) if "former" in of_arm else None
        cells += ["" if former is None else _interval(former) + (" **worse**" if former.worse else "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compare_rows(run: SoundRun, plain: Sequence[Row], other: Sequence[Row]) -> Comparison:
    return compare([row.score for row in plain], [row.score for row in other], run.metric == "accuracy")


def _spread(rows: Sequence[Row]) -> str:
    scores = [row.score for row in rows]
    return f"{_number(statistics.fmean(scores))} ± {_number(statistics.stdev(scores) if len(scores) > 1 else 0.0)}"


def _interval(result: Comparison) -> str:
    if result.effect == result.low == result.high == 0:
        return "0, to the bit"
    return f"{_number(result.effect, '+')} ({_number(result.low, '+')} to {_number(result.high, '+')})"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.1f}"


def _observed(plain: Sequence[Row], observed: Sequence[Row]) -> str:
    same = sum(before.weights == after.weights for before, after in zip(plain, observed, strict=True))
    incidents = sum(row.incidents for row in observed)
    return f"{same}/{len(plain)} to the bit, {incidents} incidents"


def main() -> None:
    """Compute what is missing, print the table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("``")[0].strip(" :"))
    parser.add_argument("--runs", nargs="+", choices=list(SOUND_RUNS), default=list(SOUND_RUNS), metavar="RUN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rows", type=Path, default=_ROWS, help="where finished rows are kept")
    parser.add_argument(
        "--output", type=Path, help="where the record goes; default benchmarks/history/no_harm-<date>.json"
    )
    parser.add_argument("--compute-only", action="store_true", help="neither print nor write: a part of a larger run")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stability_callbacks"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)

    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        _row(arguments.rows, name, seed, arm)
        for seed, name in itertools.product(arguments.seeds, arguments.runs)
        for arm in _in_turn(seed + list(SOUND_RUNS).index(name))
        if arm in arguments.arms
    ]
    if arguments.compute_only:
        return
    text = table(rows, arguments.seeds)
    print(text)
    record = {
        "benchmark": "no_harm",
        "command": "python -m benchmarks.no_harm " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system(), "threads": 1},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
        "rows": [asdict(row) for row in rows],
    }
    output = arguments.output or Path("benchmarks/history") / f"no_harm-{record['date']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


def _in_turn(turn: int) -> list[str]:
    """The arms, each of them first in its turn."""
    first = turn % len(ARMS)
    return [*ARMS[first:], *ARMS[:first]]


def _row(path: Path, name: str, seed: int, arm: str) -> Row:
    """A row from the file, or one that is trained now and appended to it."""
    kept = _read(path).get((name, seed, arm, _settings(SOUND_RUNS[name], arm)))
    if kept is not None:
        return kept
    row = train(name, seed, arm)
    with path.open("a") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")
    return row


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
