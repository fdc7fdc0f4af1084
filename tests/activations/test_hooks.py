"""Hooks on outputs: what they see, what they may replace, and that they are always gone afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.activations import ModuleCall, OutputHooks, eager, floating_tensors, named_modules


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class Branching(nn.Module):
    """Calls one layer twice, under two names, and one never; and gives all kinds of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(3, 3)
        self.never = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        x = self.again(self.first(x)) * scale
        return {"index": x.argmax(), "pair": (x, [x + 1])}


def test_sees_each_call_of_each_module_once() -> None:
    model, calls = Branching(), list[ModuleCall]()
    x = torch.ones(2, 3)
    with OutputHooks(named_modules(model), calls.append):
        output = model(x, scale=2.0)
    assert [call.name for call in calls] == ["first", "first", ""]
    assert calls[0].module is model.first
    assert calls[0].args[0] is x
    assert calls[1].args[0] is calls[0].output
    assert calls[2].kwargs == {"scale": 2.0}
    assert calls[2].output is output
    assert hooks(model) == 0


def test_a_module_that_is_given_twice_has_one_hook_under_its_first_name() -> None:
    model, seen = Branching(), list[str]()
    with OutputHooks([("one", model.first), ("two", model.again)], lambda call: seen.append(call.name)) as watched:
        assert hooks(model) == 1
        assert watched
        model.first(torch.ones(1, 3))
    assert seen == ["one"]
    assert not watched


def test_hooks_are_gone_after_an_exception_in_the_model_or_in_the_observer() -> None:
    def fail(call: ModuleCall) -> None:
        raise RuntimeError(f"at {call.name}")

    model = Branching()
    with pytest.raises(RuntimeError, match="at first"), OutputHooks(named_modules(model), fail):
        model(torch.ones(1, 3))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="shapes"), OutputHooks(named_modules(model), lambda call: None):
        model(torch.ones(1, 2))
    assert hooks(model) == 0


def test_hooks_are_gone_where_one_can_not_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hooks here")

    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))
    monkeypatch.setattr(model[1], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        OutputHooks(model.named_children(), lambda call: None)
    assert hooks(model) == 0


def test_what_is_returned_takes_the_outputs_place() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with OutputHooks([("0", model[0])], lambda call: call.output + 1):
        assert model(torch.zeros(1)).item() == 1
    assert model(torch.zeros(1)).item() == 0


def test_comes_before_or_after_hooks_that_are_there() -> None:
    model, order = nn.Identity(), list[str]()
    model.register_forward_hook(lambda *_: order.append("there"))
    for prepend in (False, True):
        with OutputHooks([("", model)], lambda call: order.append("new"), prepend=prepend):
            model(torch.zeros(1))
    assert order == ["there", "new", "new", "there"]


def test_may_be_removed_while_one_runs() -> None:
    model, seen = nn.Sequential(nn.Identity(), nn.Identity()), list[str]()

    def once(call: ModuleCall) -> None:
        seen.append(call.name)
        watched.remove()

    watched = OutputHooks(named_modules(model), once)
    model(torch.zeros(1))
    assert seen == ["0"]
    assert hooks(model) == 0


def test_eager_shows_what_is_inside_of_a_compiled_module() -> None:
    model, seen = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager")), list[str]()
    x = torch.ones(1, 2)
    expected = model(x)  # compiled now
    with eager(), OutputHooks(named_modules(model), lambda call: seen.append(call.name)):
        assert torch.equal(model(x), expected)
    assert seen == ["0.0", "0.1", "0", "0", ""]  # the wrapper and what it wraps bear one name
    assert hooks(model) == 0


@dataclass
class Output:
    logits: Tensor
    ids: Tensor
    hidden: Any = None


def test_floating_tensors_are_found_in_outputs_of_any_nesting() -> None:
    x, y, ids = torch.ones(1), torch.ones(2), torch.tensor([1])
    for output in (Output(x, ids, (y, None)), {"a": (x, ids), "b": [y]}, [x, {"ids": ids}, y]):
        found = floating_tensors(output)
        assert [each is expected for each, expected in zip(found, [x, y], strict=True)] == [True, True]
    assert floating_tensors((ids, None, "text")) == []
