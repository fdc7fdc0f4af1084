"""Two processes on the CPU that run a worker module, and what they wrote down."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["HARD_TIMEOUT", "MARKS", "PROCESSES", "logs", "outcomes", "process_group", "run_processes"]

PROCESSES = 2
ROOT = Path(__file__).parents[1]

# Seconds, against hangs alone: the longest pair takes 30 on two free cores.
HARD_TIMEOUT = 600.0

# Of tests that look at what a pair did: the first of them waits for it.
MARKS = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo meets by a file here"),
    pytest.mark.timeout(HARD_TIMEOUT + 60),
]


def run_processes(module: str, directory: Path) -> list[int]:
    """Let the processes run ``module``, each with its rank and the directory for arguments; how they ended.

    Their output goes to ``<rank>.log`` in the directory. None of them outlives the call.
    """
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(PROCESSES):
            log = stack.enter_context((directory / f"{rank}.log").open("w"))
            command = [sys.executable, "-m", module, str(rank), str(directory)]
            environment = {**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.kill)
            processes.append(process)
        return [process.wait(timeout=HARD_TIMEOUT + 30) for process in processes]


@contextlib.contextmanager
def process_group(rank: int, directory: Path) -> Iterator[None]:
    """Make this process one of the pair. A hang ends it with a traceback of where it hung."""
    faulthandler.dump_traceback_later(HARD_TIMEOUT, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=(directory / "rendezvous").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=HARD_TIMEOUT),
    )
    yield
    torch.distributed.destroy_process_group()


def logs(directory: Path) -> str:
    """The end of what each process printed."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(directory.glob("*.log")))


def outcomes(directory: Path, scenario: str, kind: str) -> list[Any]:
    """The results of a scenario, one for each process."""
    paths = [directory / f"{scenario} {kind} {rank}.pt" for rank in range(PROCESSES)]
    if not all(path.exists() for path in paths):
        pytest.fail(f"{scenario} with {kind} was not finished; `test_both_processes_end_well` shows why")
    return [torch.load(path, weights_only=False) for path in paths]
