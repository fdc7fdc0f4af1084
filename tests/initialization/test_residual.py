"""Policies for residual networks: scaled by depth, and starting as nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stability_callbacks.initialization import LSUV, Auto, DepthScaled, Kaiming, Policy, Xavier, ZeroResidual


class Layer(nn.Module):
    """A pre-norm Transformer layer's two branches, attention stood in for by a linear layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm1, self.mix, self.proj = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.mix(self.norm1(x)).tanh())
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 64, padding_idx=0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 100, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2 = (nn.BatchNorm2d(4), nn.BatchNorm2d(4)) if norm else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


def std(tensor: Tensor) -> float:
    return float(tensor.detach().std())


@pytest.mark.parametrize("layers", [1, 6])
def test_residual_projections_are_scaled_by_depth(layers: int) -> None:
    model = GPT(layers)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3.0)
    report = DepthScaled(std=0.04).apply(model)
    scaled = 0.04 / math.sqrt(2 * layers)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        assert std(layer.proj.weight) == pytest.approx(scaled, rel=0.05)
        assert std(layer.mlp[2].weight) == pytest.approx(scaled, rel=0.05)
        assert std(layer.mix.weight) == pytest.approx(0.04, rel=0.05)
        assert std(layer.mlp[0].weight) == pytest.approx(0.04, rel=0.05)
        assert not layer.mlp[2].bias.any()
        assert (layer.norm1.weight == 1).all()
    assert std(model.tokens.weight[1:]) == pytest.approx(0.04, rel=0.05)
    assert not model.tokens.weight[0].any()
    assert report["layers.0.proj.weight"].what.endswith(f"(ends 1 of {2 * layers} residual branches)")
    assert report["head.weight"].what == "left alone: tied to tokens.weight"


def test_the_stream_grows_alike_at_any_depth() -> None:
    def growth(policy: Policy, layers: int) -> float:
        model = nn.Sequential(*(Layer() for _ in range(layers)))
        policy.apply(model)
        x = torch.randn(32, 64)
        return std(model(x) - x)

    shallow, deep = (growth(DepthScaled(std=0.125), layers) for layers in (2, 16))
    assert deep == pytest.approx(shallow, rel=0.35)
    assert growth(Xavier(), 16) > 2 * growth(Xavier(), 2)


def test_residual_projections_can_be_named() -> None:
    model = GPT(2)
    report = DepthScaled(std=0.04, residual=r"proj\.weight").apply(model)
    assert [row.name for row in report if "ends 1 of 2" in row.what] == ["layers.0.proj.weight", "layers.1.proj.weight"]
    assert report["layers.0.mlp.2.weight"].what == "normal, std 0.04"


def test_torch_transformer_is_known() -> None:
    model = nn.Transformer(16, 2, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=32, batch_first=True)
    report = DepthScaled().apply(model)
    assert sum("ends 1 of 13" in row.what for row in report) == 2 * 2 + 3 * 3


def test_frozen_projections_stay() -> None:
    model = GPT(2)
    model.layers.requires_grad_(False)
    report = DepthScaled().apply(model)
    assert report["layers.0.proj.weight"].what == "left alone: frozen"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (DepthScaled(), r"`residual` must be found in .*, got None.*the kernels are 0\.weight"),
        (DepthScaled(residual="c_proj"), "got 'c_proj'"),
        (ZeroResidual(), "`model` must have a residual branch"),
    ],
)
def test_a_network_without_residual_branches_is_refused(policy: Policy, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        policy.apply(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_start_as_their_shortcuts(norm: bool) -> None:
    model = nn.Sequential(*(Block(norm) for _ in range(3)))
    before = copy.deepcopy(model.state_dict())
    report = ZeroResidual().apply(model)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model(x), x)
    zeroed = [row.name for row in report if row.initialized]
    end = "norm2" if norm else "conv2"
    assert zeroed == [f"{index}.{end}.{name}" for index in range(3) for name in ("weight", "bias")]
    for name in set(before) - set(zeroed):
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(model.state_dict()[name], before[name]), name


def test_blocks_that_start_as_nothing_learn() -> None:
    model = nn.Sequential(*(Block(norm=False) for _ in range(2)))
    ZeroResidual(Kaiming()).apply(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the ends move in the first step, and all the rest in the second
        optimizer.zero_grad()
        model(torch.randn(4, 4, 5, 5)).square().mean().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_base_writes_the_rest() -> None:
    model = nn.Sequential(Block(), Block())
    report = ZeroResidual(Auto()).apply(model)
    assert report["0.conv1.weight"].what == "Kaiming normal, fan_in 36, gain 1.41 (before relu)"
    assert report["0.norm1.weight"].what == "ones"
    assert report["1.norm2.weight"].what == "zeros (ends a residual branch)"
    assert not model[1].norm2.weight.any()


def test_transformer_branches_end_in_projections() -> None:
    model = GPT(2)
    ZeroResidual().apply(model)
    tokens = torch.randint(1, 100, (2, 5))
    expected = model.head(model.norm(model.tokens(tokens)))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DepthScaled(std=0), ValueError, "`std` must be a number > 0"),
        (lambda: DepthScaled(std="x"), TypeError, "`std` must be a number"),
        (lambda: DepthScaled(residual="("), ValueError, "`residual` must be a regular expression"),
        (lambda: DepthScaled(residual=3), TypeError, "`residual` must be a regular expression"),
        (lambda: ZeroResidual(Auto), TypeError, "`base` must be a policy or None.*a class was passed"),
        (lambda: ZeroResidual(LSUV()), TypeError, "`base` must be a policy that needs no batch"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("policy", [DepthScaled(0.1, "proj"), ZeroResidual(Auto())], ids=repr)
def test_copies_and_pickles(policy: Policy) -> None:
    assert repr(copy.deepcopy(policy)) == repr(policy)
    assert repr(pickle.loads(pickle.dumps(policy))) == repr(policy)
