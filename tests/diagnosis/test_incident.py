"""The log of incidents: what is written is read, whatever happens to the process."""

from __future__ import annotations

import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stability_callbacks.diagnosis import Incident, IncidentLog, kind_of, read_incidents

NAN, INF = math.nan, math.inf
NAMES_OF_NUMBERS = {"nan", "inf", "-inf"}

texts = st.text(st.characters(codec=None))  # lone surrogates too
counters = st.integers(-(2**63), 2**63 - 1)
incidents = st.builds(
    Incident,
    step=counters,
    epoch=counters,
    batch_idx=counters,
    rank=counters,
    kind=texts,
    evidence=st.dictionaries(
        texts, st.floats() | st.integers() | texts.filter(lambda text: text not in NAMES_OF_NUMBERS)
    ),
    action=texts,
    module=st.none() | texts,
    operation=st.none() | texts,
    source=st.none() | texts,
    bundle=st.none() | texts,
    optimizer=st.none() | texts,
    time=texts,
)


def incident(step: int = 0, **evidence: float | str) -> Incident:
    return Incident(step, 0, step, 0, "nonfinite", evidence or {"loss": NAN}, "skipped")


def comparable(value: Incident) -> str:
    """NaN equals nothing, its representation does."""
    return repr(value)


def write(path: Path, *values: Incident) -> None:
    for value in values:
        IncidentLog(path).append(value)


# ---- round trips


@given(incidents)
def test_json_keeps_everything(value: Incident) -> None:
    text = value.to_json()
    assert comparable(Incident.from_json(text)) == comparable(value)
    assert "\n" not in text
    assert text.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)


@given(st.lists(incidents, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=20)
def test_files_keep_everything(tmp_path: Path, values: list[Incident]) -> None:
    path = tmp_path / "incidents.jsonl"
    path.write_bytes(b"")
    write(path, *values)
    assert [comparable(value) for value in read_incidents(path)] == [comparable(value) for value in values]


@pytest.mark.parametrize(("number", "text"), [(NAN, "nan"), (INF, "inf"), (-INF, "-inf")])
def test_numbers_that_json_lacks_are_strings(number: float, text: str) -> None:
    written = incident(loss=number).to_json()
    assert json.loads(written)["evidence"] == {"loss": text}
    assert repr(Incident.from_json(written).evidence) == repr({"loss": number})


def test_what_is_not_known_is_not_written() -> None:
    assert set(json.loads(incident().to_json())) == {
        "step", "epoch", "batch_idx", "rank", "kind", "evidence", "action", "time",
    }  # fmt: skip
    full = replace(incident(), module="net.0", operation="log", source="model.py:3", bundle="bundles/step=0-nonfinite")
    assert json.loads(full.to_json())["module"] == "net.0"


def test_time_is_utc_and_now_by_default() -> None:
    assert incident().time.endswith("+00:00")
    assert incident().time >= "2025"


def test_evidence_that_is_neither_number_nor_text_is_refused() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        incident(loss=object()).to_json()  # type: ignore[arg-type]


def test_keys_of_newer_versions_are_left_out() -> None:
    newer = json.dumps({**asdict(incident(5, loss=1.0)), "weather": "rain"})
    assert Incident.from_json(newer).step == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"step": 1}', '{"evidence": {}}', '{"evidence": 3}'])
def test_text_that_is_no_incident_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Incident.from_json(text)


# ---- files


def test_directories_are_made(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "down" / "incidents.jsonl", incident())
    assert len(read_incidents(tmp_path / "deep" / "down" / "incidents.jsonl")) == 1


def test_a_run_without_incidents_has_no_file(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    IncidentLog(path)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        read_incidents(path)


def test_each_line_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    path = tmp_path / "incidents.jsonl"
    write(path, incident())
    assert sizes[0] == path.stat().st_size
    assert len(sizes) == 2  # the name of a new file, too
    write(path, incident())
    assert sizes[2:] == [path.stat().st_size]


def test_truncation_at_every_byte_costs_only_the_line_that_it_hits(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    write(path, incident(1), incident(2, message="höhe ∞"))
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        # A line of which only the end of line is missing is complete.
        expected = [1] * (length >= first_line - 1) + [2] * (length >= len(whole) - 1)
        is_cut = length not in (0, first_line - 1, first_line, len(whole) - 1, len(whole))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = read_incidents(path)
        assert [value.step for value in read] == expected
        assert [str(warning.message).count("left out") for warning in caught] == [1] * is_cut

        write(path, incident(3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = read_incidents(path)
        assert [value.step for value in read] == [*expected, 3]
        assert len(caught) == is_cut


def test_the_warning_says_where(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    write(path, incident(1), incident(2))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"incidents\.jsonl, line 2 is left out"):
        read_incidents(path)


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    write(path, incident(1))
    with path.open("ab") as file:
        file.write(b"\xff\x00\xfe\n")
    with pytest.warns(UserWarning, match="line 2"):
        assert len(read_incidents(path)) == 1


def test_several_may_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"

    def write_many(rank: int) -> None:
        for step in range(20):
            IncidentLog(path).append(replace(incident(step, text="x" * 10_000), rank=rank))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_many, range(3)))
    read = read_incidents(path)
    for rank in range(3):
        assert [value.step for value in read if value.rank == rank] == list(range(20))


@given(incidents)
def test_every_incident_is_a_finding(each: Incident) -> None:
    finding = each.finding()
    assert (finding.kind, finding.where) == (each.kind, each.module or "")
    assert finding.severity == kind_of(each.kind).severity
    assert finding.remedy
    assert {
        **finding.evidence,
        **({"cause": finding.causes[0]} if finding.causes else {}),
    }.keys() >= each.evidence.keys()


def test_a_finding_has_the_cause_and_the_remedy() -> None:
    evidence: dict[str, float | str] = {"loss": NAN, "cause": "sqrt of 0", "phase": "backward"}
    each = Incident(7, 0, 7, 0, "nonfinite", evidence, "skipped", module="net.norm", operation="SqrtBackward0")
    finding = each.finding()
    assert (finding.severity, finding.where, finding.causes) == ("error", "net.norm", ("sqrt of 0",))
    assert finding.evidence == {"loss": pytest.approx(NAN, nan_ok=True), "phase": "backward"}
    assert "safe_sqrt" in finding.remedy
    assert replace(each, kind="loss_scale").finding().severity == "info"


def test_without_an_explanation_the_operation_and_its_source_are_the_cause() -> None:
    each = replace(incident(1), operation="log", source="model.py:3")
    assert each.finding().causes == ("log, at model.py:3",)
    assert replace(each, operation=None, source=None).finding().causes == ()


def test_why_no_cause_was_found_is_no_cause() -> None:
    evidence: dict[str, float | str] = {"cause": "the model is sharded", "phase": ""}
    finding = Incident(7, 0, 7, 0, "nonfinite", evidence, "skipped").finding()
    assert finding.causes == ()
    assert finding.evidence["cause"] == "the model is sharded"
