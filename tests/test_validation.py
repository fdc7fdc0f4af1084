"""The checks of arguments: what passes, and what the message says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stability_callbacks._validation import (
    check_bool,
    check_choice,
    check_instance,
    check_integer,
    check_number,
    check_pattern,
)

NAN, INF = math.nan, math.inf


def error_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        check("argument", *args, **kwargs)
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), Fraction(2)])
def test_any_real_number_becomes_a_float(value: Any) -> None:
    number = check_number("argument", value)
    assert type(number) is float
    assert number == 2.0


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"above": 0}, "ValueError: `argument` must be a number > 0, got 0"),
        (-0.1, {"at_least": 0}, "ValueError: `argument` must be a number >= 0, got -0.1"),
        (1.0, {"below": 1}, "ValueError: `argument` must be a number < 1, got 1.0"),
        (1.5, {"above": 0, "at_most": 1}, "ValueError: `argument` must be a number > 0 and <= 1, got 1.5"),
        (NAN, {"above": 0}, "ValueError: `argument` must be a number > 0, got nan"),
        (NAN, {"allow_inf": True}, "ValueError: `argument` must be a number, got nan"),
        (INF, {"above": 0}, "ValueError: `argument` must be a finite number > 0, got inf"),
        (-INF, {}, "ValueError: `argument` must be a finite number, got -inf"),
        (-INF, {"above": 0, "allow_inf": True}, "ValueError: `argument` must be a number > 0, got -inf"),
        ("1", {"above": 0}, "TypeError: `argument` must be a number > 0, got '1' of type str"),
        (None, {}, "TypeError: `argument` must be a number, got None of type NoneType"),
        (True, {}, "TypeError: `argument` must be a number, got True of type bool"),
        (1j, {}, "TypeError: `argument` must be a number, got 1j of type complex"),
    ],
)
def test_a_wrong_number_is_named_with_what_is_allowed(value: Any, bounds: dict[str, Any], message: str) -> None:
    assert error_of(check_number, value, **bounds) == message


def test_a_tensor_is_no_number() -> None:
    assert error_of(check_number, torch.tensor(1.0)).startswith(
        "TypeError: `argument` must be a number, got tensor(1.)"
    )


def test_infinity_passes_where_it_is_allowed() -> None:
    assert check_number("argument", INF, above=0, allow_inf=True) == INF


@given(st.floats(-2, 2), st.floats(-1, 1), st.floats(-1, 1))
def test_bounds_mean_what_their_symbols_say(value: float, low: float, high: float) -> None:
    for bounds, inside in (
        ({"above": low, "below": high}, low < value < high),
        ({"at_least": low, "at_most": high}, low <= value <= high),
    ):
        if inside:
            assert check_number("argument", value, **bounds) == value
        else:
            assert error_of(check_number, value, **bounds).startswith("ValueError")


@pytest.mark.parametrize("value", [3, np.int64(3)])
def test_any_integer_becomes_an_int(value: Any) -> None:
    assert type(check_integer("argument", value, at_least=3, at_most=3)) is int


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"at_least": 1}, "ValueError: `argument` must be an integer >= 1, got 0"),
        (5, {"at_least": 1, "at_most": 4}, "ValueError: `argument` must be an integer >= 1 and <= 4, got 5"),
        (1.0, {}, "TypeError: `argument` must be an integer, got 1.0 of type float"),
        (True, {"at_least": 1}, "TypeError: `argument` must be an integer >= 1, got True of type bool"),
    ],
)
def test_a_wrong_integer_is_named_with_what_is_allowed(value: Any, bounds: dict[str, Any], message: str) -> None:
    assert error_of(check_integer, value, **bounds) == message


def test_only_booleans_are_booleans() -> None:
    assert check_bool("argument", False) is False
    assert error_of(check_bool, 0) == "TypeError: `argument` must be True or False, got 0 of type int"


@pytest.mark.parametrize("value", ["c", None, 1, ["a"]])
def test_a_wrong_choice_lists_the_choices(value: Any) -> None:
    assert check_choice("argument", "b", ("a", "b")) == "b"
    assert error_of(check_choice, value, ("a", "b")) == f"ValueError: `argument` must be one of 'a', 'b', got {value!r}"


def test_choices_are_told_apart_by_type() -> None:
    assert error_of(check_choice, True, (1, 2)) == "ValueError: `argument` must be one of 1, 2, got True"


def test_an_instance_is_asked_for_in_words() -> None:
    assert check_instance("argument", [1], list, "a list") == [1]
    assert error_of(check_instance, 1, list, "a list") == "TypeError: `argument` must be a list, got 1 of type int"
    assert error_of(check_instance, dict, list, "a list").endswith("(a class was passed: call it to make an instance)")


def test_patterns_are_compiled() -> None:
    assert check_pattern("argument", r"head\.").search("head.weight")
    assert error_of(check_pattern, re.compile("a")).startswith("TypeError: `argument` must be a regular expression")
    assert error_of(check_pattern, "(").startswith("ValueError: `argument` must be a regular expression, got '(': ")
