"""What is advised for which incidents."""

from __future__ import annotations

import re
from typing import Any

import pytest

import stability_callbacks.numerics
from stability_callbacks.diagnosis import KINDS, Cause, Kind, Wording, register_kind
from stability_callbacks.diagnosis._cures import _CURES
from stability_callbacks.report import Observation, advise, cure_of
from tests.report.training import incident


def wordings() -> dict[tuple[str, str | None], Wording]:
    """All that is said of kinds, by kind and phase."""
    own = {(name, None): kind.wording() for name, kind in KINDS.items()}
    return own | {(name, phase): each for name, kind in KINDS.items() for phase, each in kind.phases.items()}


TEXTS = [text for each in wordings().values() for text in (each.title, each.meaning, *each.remedies)]


def seen(kind: str, step: int = 1, cause: Cause | None = None, **details: Any) -> Observation:
    return Observation(incident(step, kind, **details), cause)


@pytest.mark.parametrize(
    ("operation", "cure"),
    [
        ("log", "safe_log"),
        ("LogBackward0", "safe_log"),
        ("sqrt_", "safe_sqrt"),
        ("LinalgVectorNormBackward0", "safe_norm"),
        ("linalg_vector_norm", "safe_norm"),
        ("div", "safe_div"),
        ("PowBackward1", "safe_pow"),
        ("AcosBackward0", "safe_acos"),
        ("softmax", "masked entirely"),
        ("addmm", "overflow"),
    ],
)
def test_an_operation_has_its_cure(operation: str, cure: str) -> None:
    text = cure_of(operation)
    assert text is not None
    assert cure in text


@pytest.mark.parametrize(
    ("operation", "reason", "cure", "never"),
    [
        ("mean", "empty", "over no elements", "overflow"),
        ("mean", "overflow_float16", "bf16", "no elements"),
        ("mse_loss", "empty", "divide a sum by the count", "`eps`"),
        ("softmax", "masked_row", "one position", "overflow"),
        ("softmax", "overflow_float16", "bf16", "masked"),
        ("StdBackward0", "pole", "before the root", "single element"),
        ("div", "overflow", "keep it away from 0", "mask"),
        ("pow", "domain", "clamp the base", "safe_pow"),
        ("my_kernel", "singular", "identity", "overflow"),
    ],
)
def test_the_reason_comes_before_the_operation(operation: str, reason: str, cure: str, never: str) -> None:
    evidence = {"phase": "forward", "reason": reason}
    [recorded] = advise([seen("nonfinite", operation=operation, module="net", evidence=evidence)])
    cause = Cause(True, "forward", "net", "Linear", operation, None, "", reason)
    [bundled] = advise([seen("nonfinite", cause=cause, operation=operation, module="net")])
    assert recorded.changes == bundled.changes
    assert cure in recorded.changes[0]
    assert never not in recorded.changes[0]
    assert recorded.finding.remedy == recorded.changes[0]
    found = incident(1, "nonfinite", operation=operation, evidence=evidence).finding()
    assert found.remedy == recorded.changes[0]
    assert " The reason: " in recorded.meaning


def test_two_reasons_at_one_place_are_two_pieces_of_advice() -> None:
    place = {"operation": "mean", "module": "net"}
    advice = advise(
        [seen("nonfinite", step, **place, evidence={"reason": reason}) for step, reason in enumerate(["empty", "pole"])]
    )
    assert [each.times for each in advice] == [1, 1]


def test_an_unknown_operation_has_none_and_the_advice_says_what_to_do() -> None:
    assert cure_of("my_kernel") is None
    [advice] = advise([seen("nonfinite", operation="my_kernel", module="net")])
    assert advice.changes[0].startswith("Replay the bundle")


def test_functions_that_are_advised_exist() -> None:
    texts = " ".join([*TEXTS, *_CURES.values()])
    names = set(re.findall(r"stability_callbacks\.numerics\.(\w+)", texts))
    assert names == set(stability_callbacks.numerics.__all__)


def test_callbacks_and_policies_that_are_advised_exist() -> None:
    from stability_callbacks import callbacks, clipping, detection, schedules

    known = {name for room in (callbacks, clipping, detection, schedules) for name in room.__all__}
    names = set(re.findall(r"`(?:[A-Za-z]+\()?([A-Z][a-zA-Z]+[a-z][A-Za-z]*)\b", " ".join(TEXTS)))
    assert names - {"MixedPrecision", "GradScaler"} <= known
    assert "StepGuard" in names


def test_steps_with_one_origin_are_one_piece_of_advice() -> None:
    log = {"operation": "log", "module": "net.head", "source": "model.py:3 in forward: `y = x.log()`"}
    observations = [
        seen("nonfinite", 1, **log),
        seen("nonfinite", 2, **{**log, "module": ""}),
        seen("nonfinite", 3, **log),
    ]
    first, second = advise(observations)
    assert (first.times, second.times) == (2, 1)
    assert first.title == "`log` in module `net.head` made a value that is not finite"
    assert second.title == "`log` in the model itself, outside of its submodules, made a value that is not finite"
    assert "`model.py:3 in forward: y = x.log()`" in first.meaning
    assert "safe_log" in first.changes[0]


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("input", "broken before they reached it"),
        ("parameter", "made it non-finite"),
        ("buffer", "Running statistics"),
        ("loss", "It came from elsewhere"),
        ("backward", "its gradient is not"),
    ],
)
def test_the_phase_of_the_cause_decides(phase: str, words: str) -> None:
    cause = Cause(True, phase, "net", "Linear", None, None, "")
    [advice] = advise([seen("nonfinite", cause=cause, module="net")])
    assert words in advice.meaning


def test_without_its_bundle_the_phase_follows_from_the_operation() -> None:
    [advice] = advise([seen("nonfinite", operation="SqrtBackward0", module="net")])
    assert advice.title == "The gradient breaks in `SqrtBackward0` in module `net`"


def test_without_its_bundle_the_phase_on_record_decides() -> None:
    [advice] = advise([seen("nonfinite", operation="log", module="net", evidence={"phase": "buffer"})])
    assert advice.title == "A buffer in module `net` became non-finite"


def test_a_cause_that_did_not_come_up_again_is_unknown() -> None:
    cause = Cause(False, None, None, None, None, None, "gave a finite loss")
    [advice] = advise([seen("nonfinite", cause=cause)])
    assert "not known where" in advice.title


def test_the_gravest_comes_first_and_everyday_business_last() -> None:
    kinds = ["loss_scale", "loss_scale", "loss_scale", "spike", "my_kind", "my_kind", "rollback", "nonfinite"]
    advice = advise([seen(kind, step) for step, kind in enumerate(kinds)])
    assert [each.kind for each in advice] == ["nonfinite", "rollback", "my_kind", "spike", "loss_scale"]
    assert "from step 0 to 2" in advice[-1].meaning


def test_no_text_has_a_gap_left() -> None:
    assert len(wordings()) > len(KINDS)
    for kind, phase in [*wordings(), ("else", None)]:
        cause = None if phase is None else Cause(True, phase, "a", "A", "b", "c", "")
        [each] = advise([seen(kind, cause=cause)])
        text = " ".join([each.title, each.meaning, *each.changes])
        assert not re.search(r"[{}]|None|  ", text)
        assert each.changes


def test_a_kind_of_the_users_own_has_its_advice_and_its_place(own_kind: Kind) -> None:
    advice = advise([seen("spike", 1), seen("spike", 2), seen("mine", 3), seen("rollback", 4)])
    assert [each.kind for each in advice] == ["rollback", "mine", "spike"]
    mine = advice[1]
    assert (mine.title, mine.meaning, mine.changes) == (own_kind.title, own_kind.meaning, own_kind.remedies)


def test_braces_that_are_no_gaps_stay(own_kind: Kind) -> None:
    register_kind(Kind("mine", title="{} {0} {x!r} {cure", remedies=("a {dict} of {'a': 1}",)))
    [advice] = advise([seen("mine")])
    assert (advice.title, advice.changes) == ("{} {0} {x!r} {cure", ("a {dict} of {'a': 1}",))


def test_advice_is_told_as_a_finding() -> None:
    log = {"operation": "log", "module": "net.head"}
    cause = Cause(True, "forward", "net.head", "Linear", "log", None, "log made 3 -inf")
    [advice] = advise(
        [seen("nonfinite", 3, **log), seen("nonfinite", 5, cause, **log), seen("nonfinite", 9, cause, **log)]
    )
    finding = advice.finding
    assert (finding.kind, finding.severity, finding.where) == ("nonfinite", "error", "net.head")
    assert finding.evidence == {"times": 3, "first step": 3, "last step": 9}
    assert finding.causes == ("log made 3 -inf", "log")
    assert finding.remedy == advice.changes[0]


def test_a_finding_of_several_places_is_of_the_whole_run() -> None:
    [advice] = advise([seen("spike", 1, module="a"), seen("spike", 2, module="b")])
    assert (advice.finding.where, advice.finding.severity) == ("", "warning")
