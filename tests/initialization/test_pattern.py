"""A policy for each part of a model, by parameter name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from stability_callbacks.initialization import LSUV, Auto, ByPattern, Normal, Orthogonal, Policy, Xavier


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "head": nn.Linear(4, 2)})


def test_first_pattern_that_matches_decides() -> None:
    net = model()
    body = copy.deepcopy(net["body"].state_dict())
    policy = ByPattern({"^body": None, r"\.bias$": Normal(), "head": Normal(std=0.5)})
    what = {row.name: row.what for row in policy.apply(net)}
    assert what == {
        "body.0.weight": "left alone: as the pattern '^body' says",
        "body.0.bias": "left alone: as the pattern '^body' says",
        "head.weight": "normal, std 0.5",
        "head.bias": "zeros",
    }
    torch.testing.assert_close(net["body"].state_dict(), body, rtol=0, atol=0)


def test_what_no_pattern_matches_is_left_alone() -> None:
    what = {row.name: row.what for row in ByPattern({"body": Auto()}).apply(model())}
    assert what["body.0.weight"] == "Kaiming normal, fan_in 4, gain 1.41 (before ReLU)"
    assert what["head.weight"] == "left alone: no pattern matches"


def test_patterns_nest() -> None:
    inner = ByPattern({"weight": Orthogonal(gain=1.0)})
    what = {row.name: row.what for row in ByPattern({"head": inner, "body": Xavier(gain=1)}).apply(model())}
    assert what["head.weight"] == "orthogonal, gain 1"
    assert what["head.bias"] == "left alone: no pattern matches"
    assert what["body.0.weight"] == "Xavier uniform, gain 1"


def test_reasons_of_the_policies_are_kept() -> None:
    net = nn.Sequential(nn.LayerNorm(4))
    assert ByPattern({".": Xavier()}).apply(net)["0.weight"].what.endswith("Xavier has no rule for it")
    net[0].requires_grad_(False)
    assert ByPattern({".": Xavier()}).apply(net)["0.weight"].what == "left alone: frozen"


def test_a_tied_parameter_is_written_by_the_name_whose_pattern_has_a_policy() -> None:
    net = model()
    net["tied"] = nn.Linear(4, 4)
    net["tied"].weight = net["body"][0].weight
    report = ByPattern({"tied": Normal(std=0.5), "body": None}).apply(net)
    assert report["tied.weight"].what == "normal, std 0.5"
    assert report["body.0.weight"].what == "left alone: tied to tied.weight"


def test_a_pattern_that_is_not_found_is_an_error() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"got \['haed'\]; the names are body\.0\.weight, .*head\.bias"):
        ByPattern({"body": Auto(), "haed": Auto()}).apply(net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("policies", "error", "message"),
    [
        ([("a", None)], TypeError, "`policies` must map patterns to policies"),
        ({}, ValueError, "at least one pattern"),
        ({"a": "Auto"}, TypeError, r"`policies\['a'\]` must be a policy or None, got 'Auto'"),
        ({"a": Auto}, TypeError, "a class was passed"),
        ({"(": None}, ValueError, "`policies` must be a regular expression"),
        ({3: None}, TypeError, "`policies` must be a regular expression"),
        ({"a": LSUV()}, TypeError, "must be a policy that needs no batch"),
    ],
)
def test_bad_arguments_are_refused(policies: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ByPattern(policies)


def test_copies_and_pickles_do_the_same() -> None:
    policy: Policy = ByPattern({"head": Normal(std=0.5)})
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert repr(twin) == repr(policy) == "ByPattern(policies={'head': Normal(std=0.5)})"
        assert twin.apply(model())["head.weight"].what == "normal, std 0.5"
