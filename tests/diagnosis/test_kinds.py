"""The registry of kinds: what it takes, and what it says of a kind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from stability_callbacks.diagnosis import KINDS, Kind, Wording, kind_of, register_kind


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "two words "}, ValueError, "`name` must be words"),
        ({"name": "<b>"}, ValueError, "`name` must be words"),
        ({"name": ""}, ValueError, "`name` must be words"),
        ({"name": "9lives"}, ValueError, "`name` must be words"),
        ({"name": "größe"}, ValueError, "`name` must be words"),
        ({"name": "line\n"}, ValueError, "`name` must be words"),
        ({"name": 3}, TypeError, "`name` must be a string"),
        ({"severity": "fatal"}, ValueError, "`severity` must be one of 'info', 'warning', 'error', got 'fatal'"),
        ({"precedence": 1.5}, TypeError, "`precedence` must be an integer"),
        ({"gravity": "high"}, TypeError, "`gravity` must be an integer"),
        ({"bundled": 1}, TypeError, "`bundled` must be True or False"),
        ({"color": "red"}, ValueError, "`color` must be a color written #rrggbb, got 'red'"),
        ({"color": "#fff"}, ValueError, "`color` must be a color written #rrggbb"),
        ({"color": "#ffffff;}"}, ValueError, "`color` must be a color written #rrggbb"),
        ({"color": None}, TypeError, "`color` must be a string"),
        ({"dark_color": "#12345g"}, ValueError, "`dark_color` must be a color written #rrggbb"),
        ({"title": None}, TypeError, "`title` must be a string"),
        ({"meaning": 3}, TypeError, "`meaning` must be a string"),
        ({"remedies": "Lower the rate."}, TypeError, "`remedies` must be a sequence of strings"),
        ({"remedies": ("a", 3)}, TypeError, r"`remedies\[1\]` must be a string"),
        ({"phases": ["forward"]}, TypeError, "`phases` must be a mapping"),
        ({"phases": {"forward": "text"}}, TypeError, r"`phases\['forward'\]` must be a Wording"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Kind(**{"name": "mine", **arguments})


def test_only_a_kind_is_registered() -> None:
    with pytest.raises(TypeError, match="`kind` must be a Kind, got 'mine'"):
        register_kind("mine")  # type: ignore[arg-type]


def test_every_kind_of_the_package_says_all() -> None:
    named = ("input", "nonfinite", "spike", "rollback", "checkpoint_refused", "loss_scale")
    default = Kind("other")
    for kind in (KINDS[name] for name in named):
        assert kind.title
        assert kind.meaning
        assert kind.remedies
        assert default.color != kind.color != kind.dark_color
    assert len({KINDS[name].color for name in named}) == len(named)
    assert [name for name in named if KINDS[name].bundled] == ["input", "nonfinite", "spike"]
    assert sorted(named, key=lambda name: KINDS[name].precedence)[:2] == ["input", "nonfinite"]


def test_an_unknown_kind_has_the_defaults_whatever_its_name() -> None:
    assert kind_of("made_up") == Kind("made_up")
    assert kind_of('<script>"') == Kind("other")
    assert kind_of("").wording().title == "A detector of your own spoke up"


def test_a_kind_is_dark_in_its_own_color_unless_told_otherwise() -> None:
    assert Kind("mine", color="#123456").dark_color == "#123456"
    assert Kind("mine", color="#123456", dark_color="#abcdef").dark_color == "#abcdef"
    assert Kind("mine").dark_color != Kind("mine").color


def test_a_kind_can_be_copied_pickled_and_hashed() -> None:
    kind = KINDS["nonfinite"]
    assert copy.deepcopy(kind) == pickle.loads(pickle.dumps(kind)) == kind
    assert len({kind, copy.copy(kind)}) == 1


def test_the_words_of_a_phase_come_before_those_of_the_kind() -> None:
    kind = Kind("mine", title="Broke", phases={"forward": Wording("Broke in `{operation}`", "", ("Mend it.",))})
    forward, other = kind.wording("forward"), kind.wording("loss")
    assert (forward.title, forward.remedies) == ("Broke in `{operation}`", ("Mend it.",))
    assert other == kind.wording()
    assert other.title == "Broke"
    assert forward.is_of_a_place
    assert not other.is_of_a_place


def test_what_a_phase_does_not_say_the_kind_says_or_general_terms() -> None:
    kind = Kind("mine", meaning="All is lost.", phases={"forward": Wording("Broke", "", ())})
    forward = kind.wording("forward")
    assert (forward.title, forward.meaning) == ("Broke", "All is lost.")
    assert forward.remedies == Kind("other").wording().remedies != ()


def test_errors_are_told_before_warnings_and_grave_ones_before_others() -> None:
    kinds = [Kind("a", "info", gravity=9), Kind("b"), Kind("c", "error", gravity=-1), Kind("d", gravity=2)]
    assert [each.name for each in sorted(kinds, key=lambda kind: kind.report_order)] == ["c", "d", "b", "a"]
