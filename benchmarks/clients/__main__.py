"""Train public products on a poisoned input, plain and with ``stability_suite``, and print what became of them.

Their packages are pinned in ``benchmarks/clients/requirements.txt``; they are no part of this project's environment::

    python -m benchmarks.clients [--only darts scvi ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.clients._client import Client
from stability_callbacks import stability_suite
from stability_callbacks.diagnosis import read_incidents

DISTRIBUTIONS = {
    "darts": "darts",
    "neuralforecast": "neuralforecast",
    "pytorch_forecasting": "pytorch-forecasting",
    "gluonts": "gluonts",
    "scvi": "scvi-tools",
    "chemprop": "chemprop",
    "timm": "timm",
    "transformers": "transformers",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a training: its metric, or the exception that ended it; and what is on record."""

    metric: float
    error: str
    incidents: str
    cause: str

    def __str__(self) -> str:
        return self.error or (f"{self.metric:.3f}" if math.isfinite(self.metric) else "trains on, all NaN")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), metavar="NAME")
    names = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| product | model, on | poison | metric | clean | poisoned | with the suite | on record | its cause |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        print(row(name), flush=True)
    shared = ("torch", "lightning", "pytorch-lightning", "numpy", "pandas")
    print(f"\nPython {sys.version.split()[0]}, " + ", ".join(f"{each} {version(each)}" for each in shared))


def row(name: str) -> str:
    """A line of the table."""
    client: Client = import_module(f"benchmarks.clients._{name}").CLIENT
    clean = run(client, poisoned=False, callbacks=[])
    plain = run(client, poisoned=True, callbacks=[])
    healed = run(client, poisoned=True, callbacks=stability_suite(client.kind))
    product = f"{DISTRIBUTIONS[name]} {version(DISTRIBUTIONS[name])}"
    cells = (product, f"{client.model}, `{client.package}`", client.poison, client.metric, clean, plain, healed)
    return "| " + " | ".join(map(str, (*cells, healed.incidents, healed.cause))) + " |"


def run(client: Client, poisoned: bool, callbacks: list[Any]) -> Outcome:
    """Train in a directory of its own, and read what was recorded there."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as directory, Path(os.devnull).open("w") as null:
        os.chdir(directory)
        metric, error = math.nan, ""
        try:
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                metric = client.train(poisoned, callbacks)
        except Exception as exception:  # noqa: BLE001  # how a product dies is what is measured
            error = f"dies: {type(exception).__name__}"
            print(f"{client.model}: {exception!r}"[:2000], file=sys.stderr)
        finally:
            os.chdir(here)
        return Outcome(metric, error, *recorded(Path(directory)))


def recorded(directory: Path) -> tuple[str, str]:
    """The incidents by kind, and the most frequent cause."""
    kinds = Counter(each.kind for path in directory.rglob("incidents.jsonl") for each in read_incidents(path))
    causes = Counter(_where(json.loads(path.read_text())) for path in directory.rglob("cause.json"))
    incidents = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    return incidents, causes.most_common(1)[0][0] if causes else "none"


def _where(cause: dict[str, Any]) -> str:
    return " ".join(str(cause[name]) for name in ("phase", "module", "operation") if cause.get(name))


if __name__ == "__main__":
    main()
