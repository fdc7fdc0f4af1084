"""Histograms of tensors that two processes hold together."""

from __future__ import annotations

from pathlib import Path

from tests.histograms import sharded_worker as worker
from tests.process_pair import MARKS, PROCESSES, logs, run_processes

pytestmark = MARKS


def test_every_process_has_the_histograms_of_the_whole_tensors(tmp_path: Path) -> None:
    assert run_processes(worker.__name__, tmp_path) == [0] * PROCESSES, logs(tmp_path)
