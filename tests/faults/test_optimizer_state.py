"""Names of the tensors that optimizers keep."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from stability_callbacks.faults import named_optimizer_state


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
