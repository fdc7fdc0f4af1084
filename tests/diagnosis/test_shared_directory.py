"""Two processes that write bundles to one directory at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stability_callbacks.diagnosis import make_room, read_bundle

ROOT = Path(__file__).parents[2]

WRITER = """
import sys
from stability_callbacks.diagnosis import Incident, make_room, write_bundle
directory, run = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for step in range(30):
    make_room(directory, 1, max_bundles=4, runs=[run])
    write_bundle(directory, incident=Incident(step, 0, step, 0, "nonfinite", {"run": run}, "skipped"), run=run)
"""


def test_no_bundle_is_lost_and_each_run_makes_room_among_its_own(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for run in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    for writer in writers:  # now both know all modules, and go at the same time
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    kept = [read_bundle(path).incident for path in tmp_path.glob("step=*")]
    for run in ("a", "b"):
        assert sorted(each.step for each in kept if each.evidence["run"] == run) == [0, 1, 28, 29]
    assert not make_room(tmp_path, 1, max_bundles=1, runs=["a"])
    assert len(list(tmp_path.iterdir())) == 8
