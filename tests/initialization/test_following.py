"""Which activation follows a layer, in the ways in which people write networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from stability_callbacks.initialization import CallGraph, activation_after


def found(model: nn.Module, name: str) -> str:
    """Name of the activation after a layer; empty for none."""
    return activation_after(CallGraph(model), name).name


class Net(nn.Module):
    """Two linear layers and what the test puts between them."""

    def __init__(self, between: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        for name, child in children.items():
            self.add_module(name, child)
        self.second = nn.Linear(4, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SELU(), nn.Sigmoid(), nn.PReLU()])
def test_modules_in_a_row(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4))
    expected = "leaky_relu" if isinstance(activation, nn.PReLU) else type(activation).__name__
    assert found(model, "0") == expected
    assert found(model, "2") == ""


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda m, x: F.relu(x), "relu"),
        (lambda m, x: torch.relu(x), "relu"),
        (lambda m, x: x.relu(), "relu"),
        (lambda m, x: F.relu_(x), "relu"),
        (lambda m, x: x.tanh(), "tanh"),
        (lambda m, x: torch.sigmoid(x), "sigmoid"),
        (lambda m, x: F.gelu(x, approximate="tanh"), "gelu"),
        (lambda m, x: F.dropout(F.layer_norm(x, (4,)), 0.1).relu(), "relu"),
        (lambda m, x: F.silu(x.view(-1, 2, 2).flatten(1)), "silu"),
        (lambda m, x: F.relu(x.to(torch.float64)[:, 1:]), "relu"),
        (lambda m, x: torch.cat([x, x]).relu(), "relu"),
        (lambda m, x: x * F.silu(x), "silu"),
        # other functions, and none
        (lambda m, x: x, ""),
        (lambda m, x: torch.softmax(x, -1), ""),
        (lambda m, x: torch.sin(x).relu(), ""),
        (lambda m, x: (x * 0.5).relu(), ""),
    ],
)
def test_functions_and_methods(between: Callable[[Any, Tensor], Any], expected: str) -> None:
    assert found(Net(between), "first") == expected


@pytest.mark.parametrize(
    "through",
    [
        nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4), nn.Dropout(),
        nn.AlphaDropout(), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Unflatten(1, (2, 2)),
        nn.Identity(), nn.ZeroPad1d(1), nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.ChannelShuffle(2),
    ],
)  # fmt: skip
def test_modules_that_are_looked_through(through: nn.Module) -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), through, nn.ReLU()), "0") == "ReLU"


@pytest.mark.parametrize(
    "stop",
    [
        nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), nn.Softmax(-1),
        nn.TransformerEncoderLayer(4, 2), nn.Embedding(4, 4),
    ],
)  # fmt: skip
def test_modules_that_end_the_search(stop: nn.Module) -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), stop, nn.ReLU()), "0") == ""


def test_settings_of_a_function_count() -> None:
    call_graph = CallGraph(Net(lambda m, x: F.leaky_relu(x, 0.5)))
    assert activation_after(call_graph, "first").gain == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.5))
    call_graph = CallGraph(Net(lambda m, x: F.leaky_relu(x, negative_slope=0.5, inplace=True)))
    assert activation_after(call_graph, "first").gain == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.5))


def test_a_shared_activation_module_follows_each_of_its_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.relu(self.two(self.relu(self.one(x)))))

    assert [found(Block(), name) for name in ("one", "two", "three")] == ["ReLU", "ReLU", ""]


def test_borders_of_modules_are_crossed() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4))),
        nn.Sequential(nn.Sequential(nn.Dropout(), nn.GELU()), nn.Linear(4, 4)),
    )
    assert found(model, "0.0") == "GELU"
    assert found(model, "1.1") == ""


class Custom(nn.Module):
    """A module with two inputs, only one of which meets an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, quiet: Tensor, loud: Tensor) -> Tensor:
        return torch.sin(quiet) + F.relu(loud)


class TwoInputs(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.one, self.two, self.join = nn.Linear(4, 4), nn.Linear(4, 4), Custom()
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        return self.join(loud=two, quiet=one) if self.by_keyword else self.join(one, two)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_value_is_followed_through_the_argument_that_it_is(by_keyword: bool) -> None:
    model = TwoInputs(by_keyword)
    assert found(model, "one") == ""
    assert found(model, "two") == "relu"


class Residual(nn.Module):
    """Post-activation, as in ResNet: the sum of branch and shortcut is rectified."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out)


class PreNorm(nn.Module):
    """The residual stream of a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_an_addition_is_looked_through() -> None:
    assert found(Residual(), "conv2") == "relu"


def test_a_residual_stream_is_not_followed_to_its_end() -> None:
    model = nn.Sequential(PreNorm(), PreNorm(), PreNorm(), nn.Tanh())
    assert [found(model, f"{index}.up") for index in range(3)] == ["gelu"] * 3
    assert [found(model, f"{index}.down") for index in range(3)] == ["", "", "Tanh"]


class Unreadable(nn.Module):
    """A forward that cannot be read, so that only the order of registration is left."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            x = x + row
        return x


def test_order_of_registration_stands_in() -> None:
    model = Unreadable(
        body=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        norm=nn.LayerNorm(4),
        tail=nn.Sequential(nn.Dropout(), nn.Tanh(), nn.Linear(4, 4)),
        last=nn.Linear(4, 4),
    )
    assert found(model, "body.0") == "ReLU"
    assert found(model, "body.2") == "Tanh"
    assert found(model, "tail.2") == ""
    assert found(model, "last") == ""
    nested = nn.Sequential(nn.Linear(4, 4), Unreadable(norm=nn.LayerNorm(4), act=nn.ELU()))
    assert found(nested, "0") == "ELU"


def test_metrics_and_losses_beside_the_network_are_harmless() -> None:
    model = Unreadable(
        net=nn.Linear(4, 4), accuracy=torchmetrics.MeanMetric(), loss=nn.CrossEntropyLoss(), act=nn.ReLU()
    )
    metric = model.accuracy
    assert isinstance(metric, torchmetrics.MeanMetric)
    metric.update(2.0)
    assert found(model, "net") == ""
    assert metric.update_count == 1
    assert metric.compute() == 2.0


def test_a_layer_whose_call_is_not_seen_has_no_known_activation() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.layer.weight))

    assert found(Direct(), "layer") == ""


class Swish(nn.Module):
    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class ScaledReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.relu(x)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], *[1] * (x.ndim - 1)), 0.9))


class CustomNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * self.scale


class CumulativeSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


def test_custom_activations_are_measured() -> None:
    call_graph = CallGraph(nn.Sequential(nn.Linear(4, 4), Swish(), nn.Linear(4, 4), ScaledReLU()))
    reference = activation_after(CallGraph(nn.Sequential(nn.Linear(4, 4), nn.SiLU())), "0")
    assert activation_after(call_graph, "0").name == "Swish"
    assert activation_after(call_graph, "0").gain == pytest.approx(reference.gain, rel=1e-9)
    assert activation_after(call_graph, "2").gain == pytest.approx(2**0.5 / 2, rel=1e-9)


@pytest.mark.parametrize("through", [DropPath(), CustomNorm()])
def test_custom_modules_that_are_looked_through(through: nn.Module) -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), through, nn.ReLU()), "0") == "ReLU"


def test_custom_modules_that_are_something_else() -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), CumulativeSum(), nn.ReLU()), "0") == ""


def test_probing_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return torch.rand(1) * F.relu(x)

    module = Counting().train()
    model = nn.Sequential(nn.Linear(4, 4), module)
    state = torch.get_rng_state()
    assert found(model, "0") == "relu"
    assert module.calls == 0
    assert not hasattr(module, "last")
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.GELU()])
def test_torch_transformer_layers(activation: Any) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, activation=activation)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.ReLU())
    expected = {"gelu": "gelu", "relu": "relu", F.silu: "silu"}.get(activation, "GELU")
    assert found(model, "0.layers.1.linear1") == expected
    assert found(model, "0.layers.1.linear2") == ""
    assert found(model, "0.layers.0.self_attn.out_proj") == ""
    assert found(nn.TransformerDecoderLayer(4, 2, 8), "linear1") == "relu"


def test_shared_modules_are_followed_from_their_first_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.again = nn.ModuleDict({"layer": self.layer})

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.again["layer"](F.relu(self.layer(x))))

    assert found(Shared(), "layer") == "relu"
    assert found(Shared(), "again.layer") == "relu"


def test_a_recursion_of_transparent_modules_ends() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.rearrange = nn.Sequential(nn.Flatten(), nn.Dropout())

        def forward(self, x: Tensor) -> Tensor:
            return self.rearrange(self.rearrange(self.layer(x)))

    assert found(Twice(), "layer") == ""
