"""The policy that chooses by layer and activation, and whether signals live through what it made."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stability_callbacks.initialization import Auto


def std(tensor: Tensor) -> float:
    return float(tensor.detach().std())


def test_each_layer_type_gets_its_own() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(500, 64, padding_idx=0),
            "lstm": nn.LSTM(64, 64),
            "attention": nn.MultiheadAttention(64, 4),
            "body": nn.Sequential(
                nn.Linear(64, 256), nn.LayerNorm(256), nn.SiLU(), nn.Linear(256, 64), nn.Tanh(), nn.PReLU()
            ),
            "norm": nn.BatchNorm1d(64),
        }
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    report = Auto(forget_bias=2.0).apply(model)
    assert std(model["embedding"].weight) == pytest.approx(1 / 8, rel=0.02)
    assert not model["embedding"].weight[0].any()
    assert model["lstm"].bias_ih_l0.sum() == 2.0 * 64
    assert report["lstm.weight_hh_l0"].what == "orthogonal per block (4), gain 1"
    assert std(model["attention"].in_proj_weight) == pytest.approx(math.sqrt(2 / 128), rel=0.03)
    assert std(model["body"][0].weight) == pytest.approx(1.6765 / 8, rel=0.02)
    assert std(model["body"][3].weight) == pytest.approx(5 / 3 * math.sqrt(2 / 320), rel=0.02)
    assert (model["norm"].weight == 1).all()
    assert not model["norm"].bias.any()
    assert not model["body"][0].bias.any()
    assert report["body.5.weight"].what == "left alone: activation slope kept, Auto has no rule for it"
    assert (model["body"][5].weight == 7).all()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(8, 32, 3), nn.Conv2d(8, 32, 3), nn.Conv3d(8, 32, 3),
        nn.ConvTranspose1d(8, 32, 3), nn.ConvTranspose2d(8, 32, 3), nn.ConvTranspose3d(8, 32, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_convolutions_of_all_ranks(conv: nn.Module) -> None:
    Auto().apply(nn.Sequential(conv, nn.LeakyReLU(0.2)))
    taps = conv.weight[0, 0].numel()
    assert std(conv.weight) == pytest.approx(math.sqrt(2 / 1.04 / (8 * taps)), rel=0.08)


def mlp(depth: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(256, 256), activation())))


@torch.no_grad()
def signal(model: nn.Sequential) -> list[float]:
    """How much the activations after each layer differ between inputs; what a bias adds to all does not count."""
    x, sizes = torch.randn(128, 256), []
    for layer in model:
        x = layer(x)
        if not isinstance(layer, nn.Linear):
            sizes.append(float(x.std(dim=0).mean()))
    return sizes


@pytest.mark.parametrize(
    ("activation", "depth"),
    [
        (nn.ReLU, 30), (partial(nn.LeakyReLU, 0.1), 30), (nn.GELU, 30), (nn.ELU, 30), (nn.SELU, 30), (nn.Mish, 30),
        (nn.Tanh, 30), (nn.SiLU, 10),
    ],
)  # fmt: skip
def test_signals_keep_their_size_through_many_layers(activation: Callable[[], nn.Module], depth: int) -> None:
    model = mlp(depth, activation)
    Auto().apply(model)
    sizes = signal(model)
    assert all(0.1 < size / sizes[0] < 10 for size in sizes), sizes


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
def test_signals_die_with_the_initialization_of_torch(activation: Callable[[], nn.Module]) -> None:
    sizes = signal(mlp(30, activation))
    assert sizes[-1] / sizes[0] < 1e-6


def test_gradients_reach_the_first_layer() -> None:
    model = mlp(30, nn.ReLU)

    def ratio() -> float:
        model.zero_grad()
        model(torch.randn(64, 256)).square().mean().backward()
        first, last = model[0].weight.grad, model[-2].weight.grad
        assert isinstance(first, Tensor)
        assert isinstance(last, Tensor)
        return float(first.norm() / last.norm())

    assert ratio() < 1e-4
    Auto().apply(model)
    assert 0.1 < ratio() < 10


def test_functional_networks_are_as_good_as_sequential_ones() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = F.dropout(F.relu(layer(x)), 0.1, self.training)
            return self.head(x)

    model = Functional()
    report = Auto().apply(model)
    assert all("Kaiming" in report[f"layers.{index}.weight"].what for index in range(3))
    assert "Xavier" in report["head.weight"].what


def test_logits_of_a_tied_head_have_variance_one() -> None:
    embedding = nn.Embedding(2000, 256)
    Auto().apply(embedding)
    logits = F.linear(F.layer_norm(torch.randn(64, 256), (256,)), embedding.weight)
    assert std(logits) == pytest.approx(1.0, rel=0.05)


def test_an_empty_argument_list_is_enough_and_bad_ones_are_refused() -> None:
    assert repr(Auto()) == "Auto(forget_bias=1.0)"
    with pytest.raises(TypeError, match="`forget_bias` must be a number"):
        Auto(forget_bias="1")
