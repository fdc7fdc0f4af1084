"""Which gradients a backward pass wrote."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stability_callbacks.faults import GradientMarks


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
