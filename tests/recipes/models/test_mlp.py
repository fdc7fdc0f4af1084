from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.models._mlp import ActivationName, DeepMLP, NormName
from recipes.results._history import HistoryLogger
from stability_callbacks import GradientClipping, GradientMonitor, Initialization, LRSchedule, StepGuard
from stability_callbacks.clipping import NormClip
from stability_callbacks.initialization import LSUV, Auto, Kaiming, Policy
from stability_callbacks.schedules import WarmupConstant

DIGIT = torch.Size([1, 8, 8])
CLASSES = 10
SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ACTIVATIONS: list[tuple[ActivationName, type[nn.Module]]] = [
    ("relu", nn.ReLU),
    ("leaky_relu", nn.LeakyReLU),
    ("elu", nn.ELU),
    ("gelu", nn.GELU),
    ("tanh", nn.Tanh),
    ("sigmoid", nn.Sigmoid),
]
NORMS: list[tuple[NormName, type[nn.Module] | None]] = [
    ("none", None),
    ("batch", nn.BatchNorm1d),
    ("layer", nn.LayerNorm),
]


def model(**options: Any) -> DeepMLP:
    return DeepMLP(DIGIT, CLASSES, SGD, **{"depth": 4, "width": 16, **options})


def linears(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


def fit(module: DeepMLP, *callbacks: Callback, steps: int = 1) -> HistoryLogger:
    images, labels = torch.randn(steps * 32, *DIGIT), torch.randint(CLASSES, (steps * 32,))
    history = HistoryLogger()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[GradientMonitor(histograms=False), *callbacks],
        logger=history,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    trainer.fit(module, loader, loader)
    return history


# ---- the network


@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS)
@pytest.mark.parametrize(("norm_name", "norm"), NORMS)
def test_each_hidden_layer_is_followed_by_its_norm_and_its_activation(
    name: ActivationName, activation: type[nn.Module], norm_name: NormName, norm: type[nn.Module] | None
) -> None:
    hidden = [nn.Linear, activation] if norm is None else [nn.Linear, norm, activation]
    layers = model(activation=name, norm=norm_name).layers
    assert [type(each) for each in layers] == [nn.Flatten, *hidden * 3, nn.Linear]


@pytest.mark.parametrize("depth", [1, 2, 30])
def test_depth_counts_linear_layers(depth: int) -> None:
    layers = linears(model(depth=depth, width=8))
    widths = [64, *[8] * (depth - 1), CLASSES]
    assert [(each.in_features, each.out_features) for each in layers] == list(itertools.pairwise(widths))


@pytest.mark.parametrize("inputs", [(64,), (8, 8), (1, 28, 28), (3, 5, 7)])
def test_inputs_of_any_shape_are_flattened(inputs: tuple[int, ...]) -> None:
    network = DeepMLP(torch.Size(inputs), 7, SGD, depth=2, width=8)
    assert network(torch.randn(5, *inputs)).shape == (5, 7)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_careless_weights(weight_norm: bool) -> None:
    for layer in linears(model(width=256, init_std=0.3, weight_norm=weight_norm)):
        assert layer.weight.std().item() == pytest.approx(0.3, rel=0.05)
        assert not layer.bias.any()


def test_without_a_standard_deviation_the_weights_are_those_of_pytorch() -> None:
    torch.manual_seed(1)
    layer = linears(model())[0]
    torch.manual_seed(1)
    expected = nn.Linear(64, 16)
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize("init_std", [0.0, -1.0, math.nan, math.inf])
def test_a_standard_deviation_out_of_bounds_is_refused(init_std: float) -> None:
    with pytest.raises(ValueError, match=r"`init_std` must be a finite number > 0"):
        model(init_std=init_std)


def test_weight_norm_learns_size_and_direction_apart() -> None:
    network = model(weight_norm=True)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    fit(network, steps=3)
    for layer in linears(network):
        size, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        rows = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        torch.testing.assert_close(layer.weight, size * rows)
        assert size.shape == (layer.out_features, 1)
    assert not any(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


# ---- with the callbacks


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize(("norm_name", "norm"), NORMS)
@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS)
def test_every_network_trains_with_every_callback(
    name: ActivationName,
    activation: type[nn.Module],
    norm_name: NormName,
    norm: type[nn.Module] | None,
    weight_norm: bool,
) -> None:
    network = model(activation=name, norm=norm_name, weight_norm=weight_norm)
    before = [layer.weight.detach().clone() for layer in linears(network)]
    cure = [
        Initialization(Kaiming(), verbose=False),
        LRSchedule(WarmupConstant(1)),
        GradientClipping(NormClip(1.0)),
        StepGuard(),
    ]
    history = fit(network, *cure, steps=2).history
    assert all(math.isfinite(loss) for _, loss in history["train/loss"])
    assert [value for _, value in history["stability/skipped_steps"]][-1] == 0
    assert all(norm > 0 for _, norm in history["grad_norm/total"])
    assert not any(torch.equal(old, layer.weight) for old, layer in zip(before, linears(network), strict=True))


@pytest.mark.parametrize("policy", [Kaiming(), LSUV(), Auto()], ids=["kaiming", "lsuv", "auto"])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_initialization_keeps_the_signal_through_thirty_layers(policy: Policy, weight_norm: bool) -> None:
    images = torch.randn(256, *DIGIT)
    network = model(depth=30, width=64, weight_norm=weight_norm)
    assert network(images).std(dim=0).mean() < 1e-6
    policy.apply(network, images)
    assert 0.1 < network(images).std(dim=0).mean() < 10


def test_lsuv_gives_every_layer_unit_variance() -> None:
    images = torch.randn(256, *DIGIT)
    network = model(depth=20, width=64, init_std=0.3)
    LSUV().apply(network, images)
    outputs: list[torch.Tensor] = []
    for layer in linears(network):
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    network(images)
    assert len(outputs) == 20
    assert all(output.var().item() == pytest.approx(1, abs=0.11) for output in outputs)


def test_the_model_logs_what_the_goal_asks_for() -> None:
    network = model()
    images, labels = torch.randn(50, *DIGIT), torch.randint(CLASSES, (50,))
    expected = (network(images).argmax(dim=1) == labels).float().mean().item()
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)  # unequal batches: 20, 20, 10
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for split, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        (scores,) = evaluate(network, loader, verbose=False)
        assert scores == {f"{split}/accuracy": pytest.approx(expected)}
