"""What `report` and `replay` say of files that are damaged: one line each, no traceback, and the rest is shown."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from stability_callbacks.__main__ import main
from stability_callbacks.diagnosis import (
    Bundle,
    BundleError,
    Cause,
    Incident,
    RandomState,
    StepRow,
    read_bundle,
    write_bundle,
)
from stability_callbacks.report._chart import Curve, Mark, chart, timeline
from stability_callbacks.report._heat_map import heat_map
from stability_callbacks.report._scalars import Series

RECORD = {
    "step": 5, "epoch": 0, "batch_idx": 5, "rank": 0, "kind": "nonfinite", "evidence": {"loss": "nan", "grad_norm": 3},
    "action": "skipped", "time": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
MODEL = """
import torch


class Log(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch):
        return self.net(batch).abs().log().mean()
"""
MODEL_NAME = "model_of_damaged_bundles:Log"

anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model")
    (directory / f"{MODEL_NAME.partition(':')[0]}.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield


def written_bundle(directory: Path) -> Path:
    row = StepRow(6, 0, 6, (0.1,), 0.5, 5.0, 1.0, 0.25, (), None, {"net": 5.0})
    return write_bundle(
        directory,
        incident=Incident(7, 0, 7, 0, "nonfinite", {"loss": float("inf")}, "skipped"),
        history=[row, row._replace(step=7, verdict=("nonfinite",))],
        batches=[torch.zeros(1, 2)],
        weights={"net.weight": torch.ones(2, 2), "net.bias": torch.zeros(2)},
        rng=RandomState.capture(),
        cause=Cause(True, "forward", "net.0", "Linear", "log", "model.py:3", "because"),
        meta={"model": MODEL_NAME, "precision": "32-true", "hyper_parameters": {}, "batch_indices": [7]},
    )


def seal(bundle: Path) -> None:
    """Give a bundle the checksums of what is in it, as someone would who edits it on purpose."""
    content = json.loads((bundle / "manifest.json").read_text())
    for name in content["files"]:
        data = (bundle / name).read_bytes()
        content["files"][name] = [len(data), zlib.crc32(data)]
    (bundle / "manifest.json").write_text(json.dumps(content))


def report(run: Path, capsys: pytest.CaptureFixture[str] | None = None) -> tuple[str, list[str]]:
    """The page, and what was said of damage, a line each."""
    assert main(["report", str(run), "--output", str(run.parent / "page.html")]) == 0
    said = [] if capsys is None else capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in said)
    return (run.parent / "page.html").read_text(encoding="utf-8"), said


def write_lines(run: Path, *lines: str | bytes) -> None:
    record = run / "flight_record"
    record.mkdir(parents=True, exist_ok=True)
    whole = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (record / "incidents.jsonl").write_bytes(whole + b"\n")


# ---- a line of the record


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("step", None, "step must be an integer of at most 64 bits, got null"),
        ("step", 2**63, "step must be an integer of at most 64 bits"),
        ("step", 5.5, "step must be an integer"),
        ("epoch", True, "epoch must be an integer of at most 64 bits, got true"),
        ("batch_idx", [1], "batch_idx must be an integer"),
        ("rank", "0", 'rank must be an integer of at most 64 bits, got "0"'),
        ("kind", 3, "kind must be a string, got 3"),
        ("action", 3, "action must be a string, got 3"),
        ("time", None, "time must be a string, got null"),
        ("module", ["net"], "module must be a string or null"),
        ("bundle", 4, "bundle must be a string or null"),
        ("evidence", {"loss": [1, 2]}, "evidence['loss'] must be a number or a string, got [1, 2]"),
        ("evidence", {"loss": None}, "evidence['loss'] must be a number or a string, got null"),
        ("evidence", {"loss": 10**400}, "evidence['loss'] must be a number or a string"),
    ],
)
def test_a_line_with_a_wrong_type_is_named_and_the_rest_is_shown(
    name: str, value: Any, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_lines(run, json.dumps(RECORD), json.dumps({**RECORD, name: value}), json.dumps({**RECORD, "step": 9}))
    page, said = report(run, capsys)
    assert "2 incidents, at 2 steps from 5 to 9." in page
    assert len(said) == 1
    assert "incidents.jsonl, line 2 is left out" in said[0]
    assert allowed in said[0]


@given(st.sampled_from(sorted(RECORD)), anything)
@few
def test_no_value_in_a_record_breaks_the_report(name: str, value: Any) -> None:
    with TemporaryDirectory() as directory:
        run = Path(directory, "run")
        write_lines(run, json.dumps(RECORD), json.dumps({**RECORD, name: value}))
        page, _ = report(run)
        assert "step 5" in page or "from" in page


@given(st.binary(max_size=30), st.integers(0, 60))
@few
def test_no_bytes_in_a_record_break_the_report(junk: bytes, place: int) -> None:
    line = json.dumps(RECORD).encode()
    with TemporaryDirectory() as directory:
        run = Path(directory, "run")
        write_lines(run, line, line[:place] + junk + line[place:])
        assert "incident" in report(run)[0]


def test_a_record_nested_beyond_reason_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "run", "[" * 200_000, json.dumps(RECORD))
    page, said = report(tmp_path / "run", capsys)
    assert "1 incident, at step 5." in page
    assert ["line 1 is left out" in line for line in said] == [True]


# ---- the table of CSVLogger


def test_a_byte_that_is_not_utf8_costs_its_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_bytes(
        b"epoch,step,loss,lr\n0,1,0.5,1\n0,2,\xb30.4,1\n0,x,1,1\n0,4,0.25,1,7\n0,9,0.125,1\n"
    )
    page, said = report(run, capsys)
    assert "last 0.125" in page
    assert [line.partition(str(run / "metrics.csv"))[2] for line in said] == [
        ", line 3: '\\\\xb30.4' in column 'loss' is left out: it is not a number",
        ", line 4 is left out: step 'x' is not an integer of at most 64 bits",
        ", line 5 has more cells than columns; the last are left out",
    ]


@given(st.binary(max_size=12), st.integers(0, 40))
@few
def test_no_bytes_in_a_table_break_the_report(junk: bytes, place: int) -> None:
    table = b"epoch,step,train_loss,grad_norm/net\n0,1,0.5,1\n0,2,0.25,1e300\n"
    with TemporaryDirectory() as directory:
        run = Path(directory, "run")
        run.mkdir()
        (run / "metrics.csv").write_bytes(table[:place] + junk + table[place:])
        report(run)


wide_steps = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9)


@given(st.lists(st.tuples(wide_steps, st.floats()), min_size=1, max_size=6), st.sampled_from([None, True, False]))
@settings(max_examples=60, deadline=None)
def test_any_numbers_can_be_drawn(points: list[tuple[int, float]], logarithmic: bool | None) -> None:
    series = Series.of(points)
    first, last = int(series.steps[0]), int(series.steps[-1])
    span = first, max(last, first + 1)
    marks = [Mark(step, "spike", "i0") for step, _ in points]
    for figure in (
        chart("Loss", [Curve("loss", series)], span, marks, logarithmic),
        heat_map({"net": series}, span, marks),
        timeline(marks, span),
    ):
        assert "step" in figure


# ---- TensorBoard's event files


def event_file(run: Path) -> Path:
    with SummaryWriter(str(run)) as writer:
        for step in range(5):
            writer.add_scalar("train_loss", float(step), step)
    [path] = run.glob("events*")
    return path


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-7], "event 6 was not written completely"),
        (lambda data: data[:-1], "event 6 was not written completely"),
        (lambda data: data + b"\x01\x02", "event 7 was not written completely"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "event 6 is damaged"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "event 1 is damaged"),
    ],
)
def test_a_damaged_event_file_is_named_and_what_comes_before_is_shown(
    damage: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = event_file(run)
    path.write_bytes(damage(path.read_bytes()))
    page, lines = report(run, capsys)
    assert lines == [f"warning: {path}: {said}; what comes after is left out"]
    shown = 0 if "event 1 " in said else 5 if "event 7" in said else 4
    assert page.count("last 3" if shown == 4 else "last 4") == (shown > 0)


def test_a_whole_event_file_is_not_complained_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event_file(tmp_path / "run")
    assert report(tmp_path / "run", capsys)[1] == []


def test_what_is_no_event_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = event_file(tmp_path / "run")
    head, body = struct.pack("<Q", 3), b"\xff\xff\xff"
    sealed = head + struct.pack("<I", masked_crc32c(head)) + body + struct.pack("<I", masked_crc32c(body))
    path.write_bytes(path.read_bytes() + sealed)
    page, said = report(tmp_path / "run", capsys)
    assert "last 4" in page
    assert len(said) == 1
    assert "its event files are read in part only" in said[0]


# ---- bundles


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.pt", [torch.ones(1)], "it must hold a dict, but holds a list"),
        ("weights.pt", torch.ones(1), "it must hold a dict, but holds a Tensor"),
        ("weights.pt", {3: torch.ones(1)}, "its keys must be names of parameters and buffers, but one is 3"),
        ("batch.pt", {"x": torch.ones(1)}, "it must hold a list, but holds a dict"),
        ("random_state.pt", 3, "it must hold a dict, but holds a int"),
        ("random_state.pt", {"torch": 1, "cuda": (), "numpy": {}, "python": ()}, "can't be understood"),
        ("cause.json", {"reproduced": 1}, "can't be understood"),
        ("cause.json", {**dict.fromkeys(Cause._fields), "reproduced": True}, "explanation must be a string, got None"),
        ("meta.json", [1], "it must hold a dict, but holds a list"),
        ("incident.json", {**RECORD, "step": None}, "step must be an integer of at most 64 bits, got null"),
        ("history.csv", "step,epoch\n1,2\n", "history.csv, line 2, is not of a history of steps"),
    ],
)
def test_a_bundle_with_a_wrong_type_is_an_error_that_names_the_file(
    name: str, content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = written_bundle(tmp_path / "run" / "flight_record" / "bundles")
    path = bundle / name
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    seal(bundle)
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        with pytest.raises(BundleError):
            read_bundle(bundle)
        assert torch.equal(before, torch.random.get_rng_state())
    assert main(["replay", str(bundle), "--model", MODEL_NAME]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"can't be read because of {name}" in line
    assert said in line
    if path.suffix != ".pt":
        page, lines = report(tmp_path / "run", capsys)
        assert [said in line for line in lines] == [True]
        assert f"can&#39;t be read because of {name}" in page


@given(st.sampled_from(["precision", "hyper_parameters", "batch_indices", "model", "without_weights"]), anything)
@few
def test_no_value_in_meta_ends_a_replay_in_a_traceback(name: str, value: Any) -> None:
    with TemporaryDirectory() as directory:
        bundle = written_bundle(Path(directory, "bundles"))
        meta = json.loads((bundle / "meta.json").read_text())
        (bundle / "meta.json").write_text(json.dumps({**meta, name: value}))
        seal(bundle)
        assert main(["replay", str(bundle), "--model", MODEL_NAME]) in (0, 1, 2)


@given(st.sampled_from(["weights.pt", "batch.pt"]), anything, st.booleans())
@few
def test_no_content_of_tensor_files_ends_a_replay_in_a_traceback(name: str, value: Any, inside: bool) -> None:
    with TemporaryDirectory() as directory:
        bundle = written_bundle(Path(directory, "bundles"))
        wrapped = {"weights.pt": {"net.weight": value, "net.bias": torch.ones(2)}, "batch.pt": [value]}[name]
        torch.save(wrapped if inside else value, bundle / name)
        seal(bundle)
        assert main(["replay", str(bundle), "--model", MODEL_NAME]) in (0, 1, 2)


@given(
    st.sampled_from([
        "manifest.json", "incident.json", "cause.json", "meta.json", "history.csv", "batch.pt", "weights.pt",
        "random_state.pt",
    ]),
    st.integers(0, 1000),
    st.integers(0, 20),
    st.binary(max_size=20),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_no_bytes_in_a_bundle_end_in_a_traceback(name: str, share: int, cut: int, junk: bytes, sealed: bool) -> None:
    with TemporaryDirectory() as directory:
        run = Path(directory, "run")
        bundle = written_bundle(run / "flight_record" / "bundles")
        path = bundle / name
        content = path.read_bytes()
        place = share * len(content) // 1000
        path.write_bytes(content[:place] + junk + content[place + cut :])
        if sealed and name != "manifest.json":
            seal(bundle)
        assert main(["replay", str(bundle), "--model", MODEL_NAME]) in (0, 1, 2)
        report(run)


def test_a_random_state_that_was_written_is_read(tmp_path: Path) -> None:
    np.random.seed(3)  # noqa: NPY002
    bundle: Bundle = read_bundle(written_bundle(tmp_path))
    assert bundle.random_state is not None
    bundle.random_state.restore()
