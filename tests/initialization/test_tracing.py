"""Reading a forward as a graph, without a trace in the module or in any random state."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from stability_callbacks.initialization._tracing import preserved_randomness, trace_forward


def calls(module: nn.Module) -> list[str] | None:
    """Names of what a forward calls, in order; None where it cannot be read."""
    graph = trace_forward(module)
    if graph is None:
        return None
    called = [node for node in graph.nodes if node.op.startswith("call")]
    names = [node.target if isinstance(node.target, str) else node.target.__name__ for node in called]
    return [name for name in names if not name.startswith("_assert")]


class Forward(nn.Module):
    """A module whose forward is the test's function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_children_are_single_nodes_and_functions_are_seen() -> None:
    assert calls(Forward(lambda m, x: torch.relu(m.layer(x)).tanh())) == ["layer", "relu", "tanh"]
    assert calls(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))) == ["0", "1"]


def test_loops_over_children_are_unrolled() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert calls(Loop()) == ["layers.0", "layers.1"]


def test_checks_of_the_input_pass() -> None:
    def forward(module: Any, x: Tensor) -> Any:
        assert x.ndim == 2, "two dimensions"
        if x.shape[1] != 2:
            raise ValueError(x.shape)
        assert x.shape[0] > 0
        return module.layer(x)

    found = calls(Forward(forward))
    assert found is not None
    assert "layer" in found


def test_arguments_with_a_default_have_it() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, flag: bool = False) -> Tensor:
            if mask is not None:
                x = x.masked_fill(mask, 0)
            if flag:
                x = x.sin()
            return self.layer(x)

    found = calls(Masked())
    assert found is not None
    assert found[-1] == "layer"
    assert not {"sin", "masked_fill"} & set(found)


def test_unpacked_shapes_and_math_are_followed() -> None:
    def forward(module: Any, x: Tensor) -> Any:
        rows, columns = x.shape
        return module.layer(x.view(rows, columns) / math.sqrt(columns))

    found = calls(Forward(forward))
    assert found is not None
    assert found[-1] == "layer"


@pytest.mark.parametrize(
    "function",
    [
        lambda module, x: [module.layer(row) for row in x],  # loops over its input
        lambda module, x: module.layer(torch.arange(int(x.shape[0]))),
        lambda module, x: next(iter(())),
        lambda module, x: module.absent(x),
    ],
)
def test_what_cannot_be_read_is_none(function: Any) -> None:
    assert trace_forward(Forward(function)) is None


def test_endless_branches_end() -> None:
    def forward(module: Any, x: Tensor) -> Any:
        while not x.sum() > 0:
            x = module.layer(x)
        return x

    def never(module: Any, x: Tensor) -> Any:
        while True:
            x = module.layer(x) if x.sum() > 0 else x.sin()

    assert trace_forward(Forward(forward)) is not None
    assert trace_forward(Forward(never)) is None


def test_nothing_happens_to_the_module() -> None:
    def forward(module: Any, x: Tensor) -> Any:
        module.last = x
        module.seen.append(x)
        module.count += 1
        module.total.add_(1)
        module.train(False)
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002
        return module.layer(x)

    module = Forward(forward)
    module.seen = []
    module.count = 0
    module.register_buffer("total", torch.zeros(1))
    fired: list[str] = []
    module.register_forward_hook(lambda *_: fired.append("outer"))
    module.layer.register_forward_hook(lambda *_: fired.append("inner"))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    assert trace_forward(module) is not None

    assert not hasattr(module, "last")
    assert (module.seen, module.count, fired) == ([], 0, [])
    assert torch.equal(module.total, torch.zeros(1))
    assert module.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_modules_that_hold_their_own_methods_are_not_touched() -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.record = self.remember

        def remember(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return x

        def forward(self, x: Tensor) -> Tensor:
            return self.record(x)

    module = Recording()
    trace_forward(module)
    assert not module.seen


def test_metrics_are_not_touched() -> None:
    metric = torchmetrics.MeanMetric()
    metric.update(3.0)
    assert trace_forward(metric) is None
    assert metric.update_count == 1
    assert metric.compute() == 3.0


def test_randomness_is_preserved_through_an_exception() -> None:
    state = torch.get_rng_state()

    def draw_and_fail() -> None:
        with preserved_randomness():
            torch.rand(3)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), state)
