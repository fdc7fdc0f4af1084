"""What a fault may hit: the names of the tensors that optimizers keep, and which gradients a backward pass wrote."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from stability_callbacks.faults import GradientMarks, named_optimizer_state


@pytest.mark.parametrize(
    ("optimizer", "kinds"),
    [
        (partial(torch.optim.AdamW, lr=0.1), ["exp_avg", "exp_avg_sq"]),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (partial(torch.optim.SGD, lr=0.1), []),
    ],
)
def test_finds_what_an_optimizer_keeps_but_its_counts(optimizer: Any, kinds: list[str]) -> None:
    model = nn.Linear(2, 1)
    optimizer = optimizer(model.parameters())
    assert not list(named_optimizer_state(optimizer, model.named_parameters()))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = dict(named_optimizer_state(optimizer, model.named_parameters()))
    assert list(found) == [f"{name}.{kind}" for name in ("weight", "bias") for kind in kinds]
    for kind in kinds:
        assert found[f"weight.{kind}"] is optimizer.state[model.weight][kind]


def written(marks: GradientMarks) -> list[str]:
    return [name for name, _ in marks.fresh()]


def test_new_and_accumulated_gradients_are_fresh_and_stale_ones_are_not() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 1), "two": nn.Linear(2, 1)})
    x = torch.ones(1, 2)
    marks = GradientMarks(model.named_parameters())
    assert written(marks) == []
    model["one"](x).sum().backward()
    assert written(marks) == ["one.weight", "one.bias"]
    marks = GradientMarks(model.named_parameters())
    model["two"](x).sum().backward()
    assert written(marks) == ["two.weight", "two.bias"]
    marks = GradientMarks(model.named_parameters())
    model["one"](x).sum().backward()  # accumulates in place
    assert written(marks) == ["one.weight", "one.bias"]
    marks = GradientMarks(model.named_parameters())
    model["two"].bias.grad = torch.zeros(1)
    assert written(marks) == ["two.bias"]
    model.zero_grad()
    assert written(marks) == []


@pytest.mark.parametrize("repeats", [1, 2])
def test_sparse_gradients_are_seen(repeats: int) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    for _ in range(repeats):
        marks = GradientMarks(embedding.named_parameters())
        embedding(torch.tensor([1, 3])).sum().backward()
        ((name, gradient),) = marks.fresh()
        assert name == "weight"
        assert gradient is embedding.weight.grad
