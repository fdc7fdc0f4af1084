"""Two processes with a model sharded between them: together they hold what one process would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stability_callbacks.initialization import Auto, Policy
from tests.initialization import sharded_worker as worker
from tests.process_pair import MARKS, PROCESSES, logs, run_processes

pytestmark = MARKS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote down."""
    directory = tmp_path_factory.mktemp("sharded")
    codes = run_processes(worker.__name__, directory)
    assert codes == [0] * PROCESSES, logs(directory)
    return [torch.load(directory / f"{rank}.pt") for rank in range(PROCESSES)]


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
