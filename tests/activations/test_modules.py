"""The walk over modules under plain names, the module that runs, and the parameters that modules own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from stability_callbacks.activations import (
    ModuleStack,
    modules_by_name,
    named_modules,
    own_parameters,
    refuse_unreachable,
)

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "several": lambda module: torch.compile(nn.DataParallel(checkpoint_wrapper(module)), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_has_the_names_of_the_plain_one(wrap: Any) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    plain = nn.Sequential(inner, nn.Linear(2, 2))
    names = [name for name, _ in plain.named_modules()]
    wrapped = wrap(nn.Sequential(wrap(inner), plain[1]))
    assert list(dict(named_modules(wrapped))) == names
    assert list(modules_by_name(wrapped)) == names
    assert modules_by_name(wrapped)["0"] is inner
    assert type(modules_by_name(wrapped)[""]) is nn.Sequential


def test_a_shared_module_comes_once_or_under_each_of_its_names() -> None:
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    assert [name for name, _ in named_modules(model)] == ["", "one", "two"]
    assert [name for name, _ in named_modules(model, remove_duplicate=False)] == ["", "one", "two", "two.0"]
    assert modules_by_name(model)["two.0"] is shared


class Recording(nn.Module):
    def __init__(self, stack: list[ModuleStack], seen: list[str], fails: bool = False) -> None:
        super().__init__()
        self.stack, self.seen, self.fails = stack, seen, fails

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.stack[0].current)
        if self.fails:
            raise RuntimeError("on purpose")
        return x


def test_the_stack_tells_which_module_runs() -> None:
    stacks, seen = list[ModuleStack](), list[str]()
    leaf = Recording(stacks, seen)
    model = nn.Sequential(leaf, nn.Sequential(Recording(stacks, seen), leaf), Recording(stacks, seen))
    stacks.append(ModuleStack(model))
    with stacks[0].watching():
        model(torch.zeros(1))
        assert stacks[0].current == ""
    assert seen == ["0", "1.0", "0", "2"]  # a shared module bears its first name


def test_the_stack_finds_its_way_after_an_exception() -> None:
    stacks, seen = list[ModuleStack](), list[str]()
    failing = nn.Sequential(Recording(stacks, seen, fails=True))
    model = nn.ModuleDict({"failing": failing, "after": Recording(stacks, seen)})
    stacks.append(ModuleStack(model))
    with stacks[0].watching():
        with pytest.raises(RuntimeError, match="on purpose"):
            failing(torch.zeros(1))
        model["after"](torch.zeros(1))
    assert seen == ["failing.0", "after"]
    with pytest.raises(RuntimeError, match="on purpose"), stacks[0].watching():
        failing(torch.zeros(1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_wrapper_does_not_own_the_parametrized_weight_that_it_passes_on() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 3))
    wrapper: Any = torch.compile(layer, backend="eager")
    assert hasattr(wrapper, "parametrizations")
    assert list(own_parameters(wrapper)) == []
    (weight, tensors, parametrization), (bias, biases, none) = own_parameters(layer)
    assert (weight, bias, none) == ("weight", "bias", None)
    assert parametrization is layer.parametrizations["weight"]
    assert tensors == (parametrization.original0, parametrization.original1)
    assert biases == (layer.bias,)


def test_parameters_without_values_are_refused() -> None:
    refuse_unreachable(nn.LazyLinear(2))  # it gets them from a batch
    with pytest.raises(ValueError, match="no parameters on the meta device, got 'weight'"):
        refuse_unreachable(nn.Linear(2, 2, device="meta"))
