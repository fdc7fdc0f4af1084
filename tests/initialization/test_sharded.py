"""Two processes with a model sharded between them: together they hold what one process would have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stability_callbacks.initialization import Auto, Policy
from tests.initialization import sharded_worker as worker

ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's file rendezvous")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote down."""
    directory = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, "-m", worker.__name__, str(rank), str(directory), str(TIMEOUT)]
        for rank in range(worker.PROCESSES)
    ]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT + 10)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * worker.PROCESSES, "\n".join(errors)
    return [torch.load(directory / f"{rank}.pt") for rank in range(worker.PROCESSES)]


@pytest.mark.parametrize("case", [*worker.POLICIES, "bfloat16"])
def test_shards_hold_the_weights_of_a_whole_model(results: list[dict[str, Any]], case: str) -> None:
    policy: Policy = worker.POLICIES.get(case, Auto())
    model = worker.build(torch.bfloat16 if case == "bfloat16" else torch.float32)
    expected: Any = worker.initialize(model, policy)
    assert expected["weights"].keys() == results[0][case]["weights"].keys()
    for result in results:
        for name, weight in expected["weights"].items():
            assert torch.equal(result[case]["weights"][name], weight), name
        for row, expected_row in zip(result[case]["rows"], expected["rows"], strict=True):
            assert row[:3] == expected_row[:3]
            assert row[3:] == pytest.approx(expected_row[3:], abs=1e-6)


def test_parameters_keep_their_identity_and_train(results: list[dict[str, Any]]) -> None:
    assert all(result["same objects"] and result["gradients"] for result in results)


def test_lsuv_says_that_it_cannot(results: list[dict[str, Any]]) -> None:
    assert all("`model` must not be sharded for LSUV" in result["lsuv"] for result in results)
