"""Two processes on the CPU that run a worker module, and what they wrote down."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["PROCESSES", "logs", "outcomes", "run_processes"]

PROCESSES = 2
ROOT = Path(__file__).parents[1]


def run_processes(module: str, directory: Path, *arguments: str, timeout: float) -> list[int]:
    """Let the processes run ``module``, each with its rank and the arguments; how they ended.

    Their output goes to ``<rank>.log`` in the directory. None of them outlives the call.
    """
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(PROCESSES):
            log = stack.enter_context((directory / f"{rank}.log").open("w"))
            command = [sys.executable, "-m", module, str(rank), *arguments]
            environment = {**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.kill)
            processes.append(process)
        return [process.wait(timeout=timeout) for process in processes]


def logs(directory: Path) -> str:
    """The end of what each process printed."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(directory.glob("*.log")))


def outcomes(directory: Path, scenario: str, kind: str) -> list[Any]:
    """The results of a scenario, one for each process."""
    paths = [directory / f"{scenario} {kind} {rank}.pt" for rank in range(PROCESSES)]
    if not all(path.exists() for path in paths):
        pytest.fail(f"{scenario} with {kind} was not finished; `test_both_processes_end_well` shows why")
    return [torch.load(path, weights_only=False) for path in paths]
