"""Names of parameters and layers, and what counts as parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stability_callbacks.gradient_pass import layer_of, measure_gradients, named_gradients, named_parameters
from tests.gradients import parameter


def test_tied_parameters_count_once_and_missing_gradients_not_at_all() -> None:
    tied, without = parameter([3.0, 4.0]), nn.Parameter(torch.zeros(2))
    norms = measure_gradients([("encoder", tied), ("frozen", without), ("decoder", tied)])
    assert norms.names == ("encoder",)
    assert norms.total == 5.0


def test_tied_parameters_of_a_module_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model(torch.ones(2, 3)).sum().backward()
    expected = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    assert torch.equal(measure_gradients(model.named_parameters(remove_duplicate=False)).total, expected)


def test_generators_and_single_parameters_are_welcome() -> None:
    weight = parameter([3.0, 4.0])
    assert measure_gradients(each for each in [weight]).total == 5.0
    assert measure_gradients(weight).total == 5.0
    assert [name for name, _ in named_gradients(weight)] == ["0"]


@pytest.mark.parametrize(
    "wrong", [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), {"weight": torch.ones(1)}, [("weight", None)], None]
)
def test_what_holds_no_parameters_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"`parameters` must be parameters or \(name, parameter\) pairs"):
        named_parameters(wrong)


def test_parameters_belong_to_the_module_that_owns_them() -> None:
    assert [layer_of(name) for name in ("net.0.weight", "head.bias", "scale")] == ["net.0", "head", "scale"]
