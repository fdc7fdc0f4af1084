"""The command line, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stability_callbacks.__main__ import main
from stability_callbacks.diagnosis import Incident, IncidentLog, RandomState, write_bundle

ROOT = Path(__file__).parents[1]

MODEL = """
import torch
from torch import nn


class Log(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.net = nn.Linear(width, width)

    def training_step(self, batch):
        return self.net(batch).abs().log().mean()


def mended():
    model = Log()
    model.training_step = lambda self_batch: (model.net(self_batch).abs() + 1).log().mean()
    return model
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "a_users_model.py").write_text(MODEL)
    return write_bundle(
        tmp_path / "bundles",
        incident=Incident(7, 0, 7, 0, "nonfinite", {"loss": float("inf")}, "skipped"),
        batches=[torch.zeros(1, 2)],
        weights={"net.weight": torch.ones(2, 2), "net.bias": torch.zeros(2)},
        rng=RandomState.capture(),
        meta={"model": "a_users_model:Log"},
    )


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stability_callbacks", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"}, capture_output=True, text=True, check=False
    )


def test_replay_names_the_cause_and_finds_the_model_in_the_working_directory(bundle: Path, tmp_path: Path) -> None:
    done = run("replay", str(bundle), "--model", "a_users_model:Log", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Step 7, nonfinite" in done.stdout
    assert "log made 2 -inf in 2 values" in done.stdout
    assert "a_users_model.py:12 in training_step" in done.stdout


def test_report_works_where_lightning_is_not_installed(tmp_path: Path) -> None:
    IncidentLog(tmp_path / "flight_record" / "incidents.jsonl").append(Incident(7, 0, 7, 0, "spike", {}, "skipped"))
    script = (
        "import sys; sys.modules.update(dict.fromkeys({'lightning', 'matplotlib'})); sys.argv = ['', 'report', '.']\n"
    )
    script += "from stability_callbacks.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Wrote report.html\n"
    assert "1 incident, at step 7." in (tmp_path / "report.html").read_text()


def test_report_takes_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IncidentLog(tmp_path / "incidents.jsonl").append(Incident(7, 0, 7, 0, "spike", {}, "skipped"))
    assert main(["report", str(tmp_path), "--output", "pages/run.html"]) == 0
    assert capsys.readouterr().out == "Wrote pages/run.html\n"
    assert (tmp_path / "pages" / "run.html").is_file()


def test_report_imports_what_registers_kinds_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "a_users_kinds.py").write_text(
        "from stability_callbacks.diagnosis import Kind, register_kind\n"
        "register_kind(Kind('late', color='#123456', title='Batches come late', remedies=('Add workers.',)))\n"
    )
    IncidentLog(tmp_path / "incidents.jsonl").append(Incident(7, 0, 7, 0, "late", {}, "none"))
    done = run("report", ".", "--import", "a_users_kinds", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "--kind-late: #123456;" in page
    assert "Batches come late" in page
    done = run("report", ".", "--import", "no_such_module", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: No module named 'no_such_module'\n")


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", "empty"]) == 2
    assert "nothing of a run was found in empty" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_mended_model_does_not_reproduce(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(bundle), "--model", "a_users_model:mended"]) == 1
    assert "The fault was not reproduced." in capsys.readouterr().out


def test_model_arguments_are_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay = ["replay", str(bundle), "--model", "a_users_model:Log", "--model-args"]
    assert main([*replay, '{"width": 2}']) == 0
    assert main([*replay, '{"width": 3}']) == 2
    assert "size mismatch" in capsys.readouterr().err
    for wrong in ("[2]", "{width: 2}"):
        with pytest.raises(SystemExit) as stop:
            main([*replay, wrong])
        assert stop.value.code == 2
        assert "must be a JSON object" in capsys.readouterr().err


def test_a_missing_model_is_asked_for_by_its_recorded_name(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(bundle)]) == 2
    assert "the bundle is of --model a_users_model:Log" in capsys.readouterr().err


def test_a_damaged_bundle_is_an_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = bundle / "batch.pt"
    batch.write_bytes(batch.read_bytes()[:-10])
    assert main(["replay", str(bundle), "--model", "a_users_model:Log"]) == 2
    assert "can't be read because of batch.pt" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_an_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(bundle), "--model", "a_users_model:Log", "--device", "no_such_device"]) == 2
    assert "no_such_device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["report", "--help"], ["replay", "--help"]])
def test_help_explains(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == (0 if arguments else 2)
    assert "usage: python -m stability_callbacks" in printed.out + printed.err
