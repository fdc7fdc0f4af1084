from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.diagnosis import RandomState, isolated


def draw() -> list[float]:
    """One number from each global generator."""
    return [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002


class TestRandomState:
    def test_restoring_repeats_every_generator(self) -> None:
        state = RandomState.capture()
        first = draw()
        assert draw() != first
        state.restore()
        assert draw() == first

    def test_a_state_is_not_changed_by_what_is_drawn_after_it(self) -> None:
        state = RandomState.capture()
        firsts = []
        for _ in range(3):
            state.restore()
            firsts.append([draw() for _ in range(1000)])
        assert firsts[0] == firsts[1] == firsts[2]

    def test_it_keeps_numpys_second_normal_number(self) -> None:
        np.random.randn()  # noqa: NPY002  # draws two and keeps one
        state = RandomState.capture()
        first = np.random.randn()  # noqa: NPY002
        state.restore()
        assert np.random.randn() == first  # noqa: NPY002

    def test_it_is_saved_and_loaded_without_pickled_code(self, tmp_path: Path) -> None:
        state = RandomState.capture()
        first = draw()
        torch.save(state._asdict(), tmp_path / "state.pt")
        RandomState(**torch.load(tmp_path / "state.pt", weights_only=True)).restore()
        assert draw() == first


class Recorder(nn.Module):
    """Keeps all kinds of things as attributes, as users do."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("table", torch.tensor([1, 2, 3]))
        self.register_buffer("state", torch.zeros(2))
        self.calls = 0
        self.outputs: list[Tensor] = []
        self.recent = deque([1, 2], maxlen=2)
        self.by_name: defaultdict[str, list[int]] = defaultdict(list)
        self.seen = {"a"}
        self.total = torch.zeros(())  # unregistered, as a metric's sums are

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        self.calls += 1
        self.outputs.append(out)
        self.recent.append(3)
        self.by_name["new"].append(1)
        self.seen.add("b")
        self.total += out.detach().abs().sum()
        self.table[0] = 7
        self.state = x.detach()[0]  # replaced, not written to
        self.late = out
        self.register_buffer("later", torch.ones(1))
        return out


def test_attributes_and_buffers_are_put_back() -> None:
    model = Recorder()
    objects = dict(vars(model))
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with isolated(model):
        model(torch.randn(4, 2))
        assert model.calls == 1
        assert model.total > 0
    assert vars(model) == objects
    assert all(vars(model)[name] is value for name, value in objects.items())
    assert (model.calls, model.outputs, list(model.recent)) == (0, [], [1, 2])
    assert (dict(model.by_name), model.seen, model.total.item()) == ({}, {"a"}, 0)
    now = dict(model.named_buffers())
    assert list(now) == list(buffers)
    for name, (buffer, values) in buffers.items():
        assert now[name] is buffer
        assert torch.equal(buffer, values)


def test_modes_and_requires_grad_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    model[0].weight.requires_grad_(False)
    with isolated(model):
        model.train()
        model[0].eval()
        model[0].weight.requires_grad_(True)
        model[0].bias.requires_grad_(False)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_the_same_objects_with_the_same_values(set_to_none: bool) -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    gradient = model.weight.grad
    version = gradient._version
    with isolated(model):
        model.zero_grad(set_to_none=set_to_none)
        model(torch.ones(1, 2)).sum().backward()
        assert model.bias.grad is not None
    assert model.weight.grad is gradient
    assert model.bias.grad is None
    assert gradient._version == version
    assert torch.equal(gradient, torch.ones(2, 2))


def test_it_begins_with_a_given_state_and_ends_with_the_old_one() -> None:
    model = nn.Dropout()
    then = RandomState.capture()
    first = draw()
    before = RandomState.capture()
    expected = draw()
    before.restore()
    with isolated(model, then):
        assert draw() == first
    assert draw() == expected


def test_everything_is_put_back_after_an_exception() -> None:
    model = Recorder()
    model.norm.weight.grad = torch.ones(2)
    state = RandomState.capture()
    expected = draw()
    state.restore()

    def fail() -> None:
        with isolated(model):
            model(torch.randn(4, 2))
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fail()
    assert draw() == expected
    assert model.calls == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(2))
    assert torch.equal(model.norm.weight.grad, torch.ones(2))


def test_large_unregistered_tensors_are_not_copied() -> None:
    model = nn.Linear(1, 1)
    model.data_set = torch.zeros((1 << 20) + 1)
    with isolated(model):
        model.data_set[0] = 1
    assert model.data_set[0] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: isolated(torch.zeros(1)), "`model` must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: isolated(nn.ReLU(), 3), "`rng` must be a RandomState"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message), call():
        pass
