"""Bundles: what was written is read, or an error names the file; and only so many are kept."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.diagnosis import (
    BundleError,
    Cause,
    Incident,
    RandomState,
    StepRow,
    bundles,
    make_room,
    read_bundle,
    tensor_bytes,
    write_bundle,
)
from stability_callbacks.diagnosis._bundle import _cause

NAN, INF = math.nan, math.inf
EVERYTHING = {
    "manifest.json", "incident.json", "meta.json", "cause.json", "history.csv", "history.png", "batch.pt", "weights.pt",
    "random_state.pt",
}  # fmt: skip
CAUSE = Cause(True, "forward", "net.0", "Linear", "log", "model.py:3", "because")
ROWS = [
    StepRow(step, 0, step, (0.125,), 0.5, 5.0, 1.0, 0.25, ("nonfinite",) * (step == 2), None, {"net": 5.0, "out": NAN})
    for step in range(3)
]


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


def incident(step: int = 2, **changes: Any) -> Incident:
    return Incident(**{
        "step": step, "epoch": 0, "batch_idx": step, "rank": 0, "kind": "nonfinite", "evidence": {"loss": NAN},
        "action": "skipped", **changes,
    })  # fmt: skip


def small(directory: Path, step: int = 0, size: int = 0) -> Path:
    return write_bundle(directory, incident=incident(step), weights={"w": torch.zeros(size // 4)})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with everything in it, for reading only."""
    return write_bundle(
        tmp_path_factory.mktemp("run") / "bundles",
        incident=incident(module="net.0"),
        history=ROWS,
        batches=[Batch(torch.ones(2, 3), torch.tensor([0, 1])), {"x": [torch.tensor(NAN)], "id": ("a", 3)}],
        weights=nn.Linear(2, 1).state_dict(),
        rng=RandomState.capture(),
        cause=CAUSE,
        meta={"model": "model:Net", "precision": "32-true", "hyper_parameters": {"width": 4, "limit": INF}},
    )


@pytest.fixture
def copied(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / full.name))


# ---- round trips


def test_everything_comes_back(full: Path) -> None:
    assert set(names(full)) == EVERYTHING
    bundle = read_bundle(full)
    assert bundle.path == full
    assert repr(bundle.incident.evidence) == repr({"loss": NAN})
    assert (bundle.incident.module, bundle.incident.bundle) == ("net.0", full.name)
    assert repr(bundle.history) == repr(ROWS)
    assert bundle.batches is not None
    assert bundle.weights is not None
    assert torch.equal(bundle.batches[0].x, torch.ones(2, 3))
    assert bundle.batches[1]["x"][0].isnan()
    assert bundle.batches[1]["id"] == ("a", 3)
    nn.Linear(2, 1).load_state_dict(bundle.weights)
    assert bundle.cause == CAUSE
    assert bundle.meta["hyper_parameters"] == {"width": 4, "limit": INF}
    assert bundle.meta["versions"]["torch"] == torch.__version__
    assert bundle.meta["left_out"] == []


def test_the_random_state_repeats_the_step(tmp_path: Path) -> None:
    path = write_bundle(tmp_path, incident=incident(), rng=RandomState.capture())
    expected = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    state = read_bundle(path).random_state
    assert state is not None
    state.restore()
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    assert random.random() == expected[2]


def test_what_is_not_given_is_not_there(tmp_path: Path) -> None:
    path = write_bundle(tmp_path, incident=incident())
    assert names(path) == ["incident.json", "manifest.json", "meta.json"]
    bundle = read_bundle(path)
    assert (bundle.history, bundle.batches, bundle.weights) == ([], None, None)
    assert (bundle.random_state, bundle.cause) == (None, None)


def test_an_empty_batch_is_not_no_batch(tmp_path: Path) -> None:
    assert read_bundle(write_bundle(tmp_path, incident=incident(), batches=[])).batches == []


def test_tensors_may_be_left_unread(full: Path) -> None:
    bundle = read_bundle(full, tensors=False)
    assert (bundle.batches, bundle.weights, bundle.random_state) == (None, None, None)
    assert bundle.cause == CAUSE
    assert len(bundle.history) == 3


def test_classes_of_batches_come_back_where_allowed(full: Path) -> None:
    asked, unasked = read_bundle(full, allow_classes=True), read_bundle(full)
    assert asked.batches is not None
    assert unasked.batches is not None
    assert type(asked.batches[0]) is Batch
    assert type(unasked.batches[0]) is not Batch


def test_files_are_read_with_weights_only(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: asked.append(kwargs["weights_only"]) or load(*args, **kwargs)
    )
    read_bundle(full, allow_classes=True)
    assert asked == [True, True, True]


def test_what_can_not_be_stored_is_listed(tmp_path: Path) -> None:
    meta = {"hyper_parameters": {"width": 4, "loss": nn.MSELoss(), "sizes": (1, [2, object()]), "keys": {1: 2}}}
    path = write_bundle(tmp_path, incident=incident(), batches=[{"x": torch.ones(1), "image": object()}], meta=meta)
    bundle = read_bundle(path)
    assert bundle.meta["hyper_parameters"] == {"width": 4}
    assert bundle.meta["left_out"] == [
        "batch.pt: [0]['image']",
        "meta['hyper_parameters']['loss']",
        "meta['hyper_parameters']['sizes'][1][1]",
        "meta['hyper_parameters']['keys']",
    ]
    assert bundle.batches is not None
    assert torch.equal(bundle.batches[0]["x"], torch.ones(1))


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_every_json_file_is_strict(tmp_path: Path, number: float) -> None:
    path = write_bundle(tmp_path, incident=incident(evidence={"loss": number}), meta={"limit": [number]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for file in path.glob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    assert repr(read_bundle(path).meta["limit"]) == repr([number])


# ---- names


def test_names_tell_step_kind_and_process(tmp_path: Path) -> None:
    assert write_bundle(tmp_path, incident=incident(7)).name == "step=7-nonfinite"
    assert write_bundle(tmp_path, incident=incident(7)).name == "step=7-nonfinite-2"
    assert write_bundle(tmp_path, incident=incident(7)).name == "step=7-nonfinite-3"
    assert write_bundle(tmp_path, incident=incident(7, rank=1)).name == "step=7-nonfinite-rank1"
    assert write_bundle(tmp_path, incident=incident(7, kind="a/../b c")).name == "step=7-a_.._b_c"
    assert len(names(tmp_path)) == len(bundles(tmp_path)) == 5


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = write_bundle(tmp_path, incident=incident(), history=ROWS)
    assert names(path) == ["history.csv", "incident.json", "manifest.json", "meta.json"]
    assert len(read_bundle(path).history) == 3


# ---- damage


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_a_file_that_is_missing_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: it is missing.*Use another bundle"):
        read_bundle(copied)
    assert bundles(copied.parent) == []


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_truncation_at_every_byte_is_noticed(copied: Path, name: str) -> None:
    size = (copied / name).stat().st_size
    for length in range(size - 1, -1, -1 if size < 3000 else -7):
        os.truncate(copied / name, length)
        with pytest.raises(BundleError, match=name):
            read_bundle(copied, tensors=False)  # sizes are looked at in any case


@pytest.mark.parametrize("name", sorted(EVERYTHING - {"manifest.json"}))
def test_a_byte_that_changed_is_noticed(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: it is damaged: its checksum"):
        read_bundle(copied)


def test_a_manifest_in_which_a_byte_changed_lets_nothing_pass(copied: Path) -> None:
    whole, expected = (copied / "manifest.json").read_bytes(), repr(read_bundle(copied, tensors=False))
    for index in range(len(whole)):
        content = bytearray(whole)
        content[index] ^= 1
        (copied / "manifest.json").write_bytes(content)
        try:
            read = repr(read_bundle(copied, tensors=False))
        except BundleError:
            continue
        assert read == expected  # the change was in the time of writing, or in a space, or in a checksum not looked at


def test_content_that_can_not_be_understood_is_an_error_too(tmp_path: Path) -> None:
    path = write_bundle(tmp_path, incident=incident(), batches=[torch.ones(1)])
    other = tmp_path / "other.pt"
    torch.save(nn.Linear(1, 1), other)  # code, which must not run
    for content in (other.read_bytes(), b"no archive"):
        (path / "batch.pt").write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["batch.pt"] = [len(content), zlib.crc32(content)]
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=r"batch\.pt: it can't be understood"):
            read_bundle(path)


def test_a_later_format_is_told_apart_from_damage(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(BundleError, match=r"format 2.*install a newer stability-callbacks"):
        read_bundle(copied)


def test_a_directory_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: it is missing"):
        read_bundle(tmp_path)


# ---- interrupted writes


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    small(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, 2)
    assert names(tmp_path) == ["step=1-nonfinite"]


def test_a_killed_write_leaves_no_bundle_and_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        patch.setattr(shutil, "rmtree", kill)  # nobody is left to clear up
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path)
    (leftover,) = tmp_path.iterdir()
    assert "manifest.json" in names(leftover)
    assert bundles(tmp_path) == []
    make_room(tmp_path, 0)  # it might be another process, at work
    assert leftover.exists()
    for path in (leftover, *leftover.rglob("*")):
        os.utime(path, (time.time() - 4000,) * 2)
    make_room(tmp_path, 0)
    assert names(tmp_path) == []


# ---- how many are kept


def fill(directory: Path, steps: range, size: int = 0, **limits: int) -> list[bool]:
    kept = []
    for step in steps:
        kept.append(make_room(directory, size, **limits))
        if kept[-1]:
            small(directory, step, size)
    return kept


def steps(directory: Path) -> list[int]:
    return [read_bundle(path).incident.step for path in bundles(directory)]


def test_they_are_listed_oldest_first_whatever_their_steps(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        small(tmp_path, step)
    assert steps(tmp_path) == [100, 9, 20]
    assert bundles(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("max_bundles", "expected"), [(1, [0]), (2, [0, 9]), (3, [0, 1, 9]), (4, [0, 1, 8, 9]), (5, [0, 1, 2, 8, 9])]
)
def test_the_first_half_and_the_newest_are_kept(tmp_path: Path, max_bundles: int, expected: list[int]) -> None:
    kept = fill(tmp_path, range(10), max_bundles=max_bundles)
    assert steps(tmp_path) == expected
    assert kept == [True] + [max_bundles > 1] * 9


def test_bytes_are_bounded_and_the_first_do_not_shut_out_the_newest(tmp_path: Path) -> None:
    size, overhead = 100_000, 5_000
    assert all(fill(tmp_path, range(10), size, max_bundles=16, max_bytes=4 * (size + overhead)))
    assert steps(tmp_path) == [0, 1, 8, 9]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 4 * (size + overhead)


def test_one_that_can_not_fit_removes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, range(4), max_bundles=4)
    assert not make_room(tmp_path, 10_000, max_bundles=4, max_bytes=9_999)
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_damaged_ones_go_first(tmp_path: Path) -> None:
    fill(tmp_path, range(4), max_bundles=4)
    os.truncate(tmp_path / "step=1-nonfinite" / "weights.pt", 5)
    assert make_room(tmp_path, 0, max_bundles=4)
    assert names(tmp_path) == [f"step={step}-nonfinite" for step in (0, 2, 3)]


def test_what_is_no_bundle_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "step=1-notes").mkdir()
    (tmp_path / "step=1-notes" / "notes.txt").write_text("mine")
    fill(tmp_path, range(5), max_bundles=2)
    assert (tmp_path / "step=1-notes" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"needed": -1}, "`needed` must be an integer >= 0"),
        ({"needed": 0, "max_bundles": 0}, "`max_bundles` must be an integer >= 1"),
        ({"needed": 0, "max_bytes": 0}, "`max_bytes` must be an integer >= 1"),
    ],
)
def test_bad_bounds_raise(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_room(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(3), 12),
        (np.zeros(3), 24),
        (Batch(torch.zeros(1), torch.zeros(2, dtype=torch.int64)), 20),
        ([{"a": (torch.zeros(1), "text", b"bytes")}, None, 3], 4),
        (incident(evidence={"x": torch.zeros(5)}), 20),
    ],
    ids=["tensor", "array", "namedtuple", "nested", "dataclass"],
)
def test_bytes_of_batches(value: Any, expected: int) -> None:
    assert tensor_bytes(value) == expected


def test_a_cause_of_an_older_and_of_a_newer_version_is_read() -> None:
    old = {name: value for name, value in CAUSE._asdict().items() if name != "reason"}
    assert _cause(old) == CAUSE
    assert _cause({**old, "reason": "pole", "of_a_newer_version": 3}) == CAUSE._replace(reason="pole")
