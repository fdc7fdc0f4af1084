"""Xavier, Kaiming, orthogonal, normal and truncated normal, against torch.nn.init and the formulas."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stability_callbacks.initialization import Kaiming, Normal, Orthogonal, Policy, TruncNormal, Xavier

POLICIES: list[Policy] = [Xavier(), Kaiming(), Orthogonal(), Normal(), TruncNormal()]


def seeded(function: Callable[[], Any]) -> Any:
    torch.manual_seed(17)
    return function()


@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Bilinear(3, 4, 5)])
@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        (Xavier(), nn.init.xavier_uniform_),
        (Xavier("normal", gain=1.7), lambda w: nn.init.xavier_normal_(w, gain=1.7)),
        (Kaiming(nonlinearity="relu"), lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        (
            Kaiming("fan_out", "uniform", "tanh"),
            lambda w: nn.init.kaiming_uniform_(w, mode="fan_out", nonlinearity="tanh"),
        ),
        (Kaiming(nonlinearity="linear"), lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear")),
        (Orthogonal(gain=1.3), lambda w: nn.init.orthogonal_(w, gain=1.3)),
        (Normal(std=0.3), lambda w: nn.init.normal_(w, std=0.3)),
        (TruncNormal(std=0.3), lambda w: nn.init.trunc_normal_(w, std=0.3, a=-0.6, b=0.6)),
    ],
)  # fmt: skip
def test_ordinary_layers_get_what_torch_draws(
    layer: nn.Module, policy: Policy, reference: Callable[[Tensor], Tensor]
) -> None:
    layer = copy.deepcopy(layer)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    expected = seeded(lambda: reference(torch.empty_like(weight)))
    seeded(lambda: policy.apply(layer))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)
    assert not bias.any()


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@given(rows=st.integers(30, 90), columns=st.integers(30, 90), gain=st.floats(0.1, 5))
@settings(max_examples=20)
def test_xavier_has_its_standard_deviation(distribution: Any, rows: int, columns: int, gain: float) -> None:
    layer = nn.Linear(columns, rows)
    Xavier(distribution, gain).apply(layer)
    expected = gain * math.sqrt(2 / (rows + columns))
    assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.1)
    if distribution == "uniform":
        assert float(layer.weight.detach().abs().max()) <= expected * math.sqrt(3) * (1 + 1e-6)


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 32 * 9 / 4), ("fan_out", 64 * 9 / 4)])
def test_kaiming_counts_groups(mode: Any, fan: float) -> None:
    layer = nn.Conv2d(32, 64, 3, groups=4)
    report = Kaiming(mode, nonlinearity="relu").apply(layer)
    assert f"{mode} {fan:g}, gain 1.41" in report["weight"].what
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan), rel=0.03)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, groups=8),
        nn.ConvTranspose2d(32, 64, 4, stride=2, padding=1),
        nn.ConvTranspose2d(64, 64, 2, stride=2, groups=2),
        nn.ConvTranspose1d(128, 32, 5),
    ],
    ids=["conv", "grouped", "transposed", "transposed grouped", "transposed 1d"],
)
def test_kaiming_keeps_the_variance_of_a_signal(layer: nn.Module) -> None:
    Kaiming(nonlinearity="linear").apply(layer)
    size = (16,) if isinstance(layer, nn.ConvTranspose1d) else (16, 16)
    output = layer(torch.randn(32, int(layer.in_channels), *size))[..., 3:-3]
    assert float(output.detach().var()) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("policy", [Xavier(), Kaiming(), Orthogonal()])
def test_gain_comes_from_the_activation_that_follows(policy: Policy) -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))
    report = policy.apply(model)
    stds = [float(model[index].weight.detach().std()) * math.sqrt(200) for index in (0, 2, 4)]
    assert stds == pytest.approx([math.sqrt(2), 5 / 3, 1.0], rel=0.03)
    assert "before ReLU" in report["0.weight"].what
    assert "before Tanh" in report["2.weight"].what
    assert "no activation found" in report["4.weight"].what


@pytest.mark.parametrize(
    ("layer", "blocks"),
    [
        (nn.Linear(5, 9), 1),
        (nn.Linear(9, 5), 1),
        (nn.Conv2d(8, 6, 3, groups=2), 2),
        (nn.ConvTranspose2d(8, 6, 3, groups=2), 2),
        (nn.Conv1d(6, 6, 3, groups=6), 6),
    ],
)
def test_orthogonal_matrices_for_each_linear_map(layer: nn.Module, blocks: int) -> None:
    Orthogonal(gain=2.0).apply(layer)
    assert isinstance(layer.weight, Tensor)
    for block in layer.weight.detach().chunk(blocks):
        matrix = block.flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(gram, 4 * torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_attention_projections_are_linear_maps_of_their_own() -> None:
    attention = nn.MultiheadAttention(128, 4)
    Orthogonal().apply(attention)
    for block in attention.in_proj_weight.detach().chunk(3):
        torch.testing.assert_close(block @ block.T, torch.eye(128), atol=1e-5, rtol=0)
    Xavier().apply(attention)
    assert float(attention.in_proj_weight.detach().std()) == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()


def test_truncated_normal_has_no_outliers_whatever_its_scale() -> None:
    layer = nn.Linear(300, 300)
    TruncNormal(std=0.02).apply(layer)
    weight = layer.weight.detach()
    assert float(weight.abs().max()) <= 0.04
    assert float(weight.std()) == pytest.approx(0.88 * 0.02, rel=0.02)


@pytest.mark.parametrize("policy", [Normal(std=0.5), TruncNormal(std=0.5)])
def test_embeddings_keep_their_padding_row(policy: Policy) -> None:
    embedding = nn.Embedding(1000, 8, padding_idx=3, sparse=True)
    nn.init.ones_(embedding.weight)
    policy.apply(embedding)
    assert not embedding.weight[3].any()
    assert embedding.weight[torch.arange(1000) != 3].any(dim=1).all()
    assert float(embedding.weight.detach().std()) == pytest.approx(
        0.5 if isinstance(policy, Normal) else 0.44, rel=0.05
    )


@pytest.mark.parametrize("policy", [Xavier(), Kaiming(), Orthogonal()])
def test_norms_and_embeddings_are_left_alone(policy: Policy) -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    report = policy.apply(model)
    assert not any(row.initialized for row in report)
    assert "norm scale kept" in report["1.weight"].what
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_policies_survive_copies_and_pickles(policy: Policy) -> None:
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert type(twin) is type(policy)
        assert vars(twin) == vars(policy)
        assert repr(twin) == repr(policy)


def test_repr_shows_the_arguments() -> None:
    assert repr(Kaiming("fan_out")) == "Kaiming(mode='fan_out', distribution='normal', nonlinearity=None)"
    assert repr(Xavier(gain=2)) == "Xavier(distribution='uniform', gain=2.0)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Xavier("gaussian"), "`distribution` must be one of 'uniform', 'normal', got 'gaussian'"),
        (lambda: Xavier(gain=0), "`gain` must be a number > 0, got 0"),
        (lambda: Kaiming("fan"), "`mode` must be one of 'fan_in', 'fan_out', got 'fan'"),
        (lambda: Kaiming(distribution=1), "`distribution` must be one of"),
        (lambda: Kaiming(nonlinearity="rleu"), "`nonlinearity` must be one of 'linear', 'relu', .*, got 'rleu'"),
        (lambda: Orthogonal(gain=float("nan")), "`gain` must be a number > 0, got nan"),
        (lambda: Normal(std=-1), "`std` must be a number > 0, got -1"),
        (lambda: TruncNormal(std=0), "`std` must be a number > 0, got 0"),
    ],
)
def test_bad_values_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: Xavier(gain="2"), lambda: Orthogonal(True), lambda: Normal(None)])
def test_bad_types_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        make()
