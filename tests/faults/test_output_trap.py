"""The trap at modules' outputs: one output is corrupted once, and its hooks are gone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stability_callbacks.activations import eager
from stability_callbacks.faults import Fault, OutputTrap
from tests.models import assert_same_bits


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Sequential(nn.Linear(4, 5), nn.Tanh()))


def spring(model: nn.Module, fault: Fault, step: int = 0, **arguments: Any) -> tuple[OutputTrap, list[str]]:
    hit: list[str] = []
    return OutputTrap(fault, step, model.named_modules(), hit.append, **arguments), hit


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", 100.0])
def test_corrupts_one_element_or_multiplies_all_of_one_output_once(value: Any) -> None:
    model, x = net(), torch.randn(2, 3)
    clean = model[0](x)
    trap, hit = spring(model, Fault("activation", value, steps=0, where="^0$"))
    corrupted = model[0](x)
    if isinstance(value, str):
        differ = corrupted != clean
        assert int(differ.sum()) == 1
        assert repr(float(corrupted[differ].detach())) == value
    else:
        assert_same_bits(corrupted, clean * value)
    assert hit == ["0"]
    assert hooks(model) == 0
    assert_same_bits(model[0](x), clean)
    trap.remove()


@pytest.mark.parametrize("value", ["nan", 100.0])
@pytest.mark.parametrize("where", ["0", "1", "2", "2.1"])
def test_autograd_gets_through_any_module(where: str, value: Any) -> None:
    model = net()
    spring(model, Fault("activation", value, steps=0, where=f"^{where}$"))
    model(torch.randn(2, 3)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert (value == "nan") == any(not gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_a_factor_multiplies_the_gradient_too() -> None:
    gradients = []
    for factor in (1.0, 50.0):
        model = net()
        spring(model, Fault("activation", factor, steps=0, where="2.1"))
        model(torch.ones(2, 3)).sum().backward()
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(gradients[1], 50 * gradients[0])


def test_draws_among_the_modules_that_hold_no_others_or_those_named() -> None:
    model, x = net(), torch.randn(2, 3)
    leaves: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for step in range(200):
        for counts, where in ((leaves, None), (named, "^2")):
            _, hit = spring(model, Fault("activation", steps=0, where=where), step)
            model(x)
            counts.update(hit)
    assert leaves.keys() == {"0", "1", "2.0", "2.1"}
    assert named.keys() == {"2", "2.0", "2.1"} - {"2"}  # a container's output comes after those of its members
    assert min(leaves.values()) > 25


def test_a_container_can_be_named() -> None:
    model = net()
    _, hit = spring(model, Fault("activation", steps=0, where="^2$"))
    model(torch.randn(2, 3))
    assert hit == ["2"]


def test_a_module_that_is_not_called_leaves_the_fault_to_the_next() -> None:
    attention = nn.Sequential()
    attention.add_module("attention", nn.MultiheadAttention(4, 2))
    x = torch.randn(3, 1, 4)
    # Attention uses its output projection's weights without calling it, but gives an output itself.
    _, hit = spring(attention, Fault("activation", steps=0, where="attention"))
    (output, weights) = attention.attention(x, x, x)
    assert hit == ["attention"]
    assert int(output.isnan().sum()) + int(weights.isnan().sum()) == 1
    trap, hit = spring(attention, Fault("activation", steps=0, where="out_proj"))
    attention.attention(x, x, x)
    assert hit == []
    assert hooks(attention) == 1
    trap.remove()
    assert hooks(attention) == 0


class Nested(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"index": x.argmax(), "pair": (x, [x + 1]), "empty": x[:0]}


def test_an_output_of_any_nesting_is_rebuilt_around_one_corrupted_tensor() -> None:
    model, x = nn.Sequential(Nested()), torch.randn(2, 3)
    places = set()
    for step in range(20):
        spring(model, Fault("activation", steps=0), step)
        output = model(x)
        assert list(output) == ["index", "pair", "empty"]
        assert type(output["pair"]) is tuple
        assert type(output["pair"][1]) is list
        bad = [bool(tensor.isnan().any()) for tensor in (output["pair"][0], output["pair"][1][0])]
        assert sum(bad) == 1
        places.add(bad.index(True))
    assert places == {0, 1}
    assert not x.isnan().any()


def test_integer_outputs_are_passed_over() -> None:
    class Argmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    model = nn.Sequential(Argmax(), nn.Embedding(3, 2))
    _, hit = spring(model, Fault("activation", steps=0, where="0|1"))
    assert int(model(torch.randn(5, 3)).isnan().sum()) >= 1
    assert hit == ["1"]


def test_unarmed_it_tells_but_changes_no_bit() -> None:
    model, x = net(), torch.randn(2, 3)
    clean = model(x)
    _, hit = spring(model, Fault("activation", steps=0, where="^1$"), armed=False)
    assert_same_bits(model(x), clean)
    assert hit == ["1"]
    assert hooks(model) == 0


WRAPPERS: dict[str, Any] = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_module_is_hit_under_its_plain_name(wrap: Any) -> None:
    model = net()
    model[2] = wrap(model[2])
    with eager():
        _, hit = spring(model, Fault("activation", steps=0, where=r"^2\.1$"))
        output = model(torch.randn(2, 3))
    assert hit == ["2.1"]
    assert int(output.isnan().sum()) == 1
    assert hooks(model) == 0


def test_a_shared_module_is_hit_once() -> None:
    shared = nn.Tanh()
    model = nn.Sequential(shared, nn.Identity(), shared)
    _, hit = spring(model, Fault("activation", 100.0, steps=0, where="^[02]$"))
    x = torch.ones(1)
    assert torch.equal(model(x), torch.tanh(100 * torch.tanh(x)))
    assert hit == ["0"]


def test_comes_before_hooks_that_look() -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(bool(output.isnan().any())))
    spring(model, Fault("activation", steps=0, where="^0$"))
    model(torch.randn(2, 3))
    assert seen == [True]
