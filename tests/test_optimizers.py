"""What is asked of every optimizer, whoever wrote it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stability_callbacks._optimizers import is_of_torch, parameters_of


class Own(torch.optim.SGD):
    """A subclass of a user's, of whose ``step`` nothing is known."""


def test_parameters_come_group_by_group_in_the_optimizers_order() -> None:
    one, two, three = (nn.Parameter(torch.zeros(size)) for size in (1, 2, 3))
    optimizer = torch.optim.SGD([{"params": [three, one]}, {"params": [two]}], lr=0.1)
    assert [id(each) for each in parameters_of(optimizer)] == [id(three), id(one), id(two)]
    optimizer.param_groups[0]["params"].clear()
    assert [id(each) for each in parameters_of(optimizer)] == [id(two)]


@pytest.mark.parametrize(("kind", "expected"), [(torch.optim.SGD, True), (torch.optim.AdamW, True), (Own, False)])
def test_a_subclass_of_a_users_is_not_of_torch(kind: type[torch.optim.Optimizer], expected: bool) -> None:
    assert is_of_torch(kind([nn.Parameter(torch.zeros(1))], lr=0.1)) is expected  # type: ignore[call-arg]
