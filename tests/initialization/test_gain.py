"""The gain of an activation, against its closed form, sampling, and torch's own table."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stability_callbacks.initialization._gain import (
    ACTIVATION_NAMES,
    module_activation,
    named_activation,
    second_moment_gain,
)


def gain(name: str) -> float:
    activation = named_activation(name)
    assert activation is not None
    return activation.gain


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.0])
def test_leaky_slopes_have_the_gain_of_torch(slope: float) -> None:
    found = module_activation(nn.LeakyReLU(slope))
    assert found is not None
    assert found.gain == pytest.approx(nn.init.calculate_gain("leaky_relu", slope), rel=1e-9)
    assert not found.saturating


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_named_gains_are_those_of_torch(name: str) -> None:
    assert gain(name) == pytest.approx(nn.init.calculate_gain(name), rel=1e-9)


def test_selu_keeps_its_variance_by_itself() -> None:
    assert gain("selu") == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.mish, F.elu, F.hardswish, F.softplus])
def test_second_moment_gain_agrees_with_sampling(function: object) -> None:
    assert callable(function)
    samples = torch.randn(1_000_000, dtype=torch.float64)
    sampled = 1 / math.sqrt(function(samples).square().mean())
    assert second_moment_gain(function) == pytest.approx(sampled, rel=5e-3)


def test_published_second_moments() -> None:
    # E[gelu(z)^2] = 1/3 + 1 / (2 sqrt(3) pi), E[relu6] differs from relu beyond 6 only.
    assert second_moment_gain(F.gelu) == pytest.approx((1 / 3 + 1 / (2 * math.sqrt(3) * math.pi)) ** -0.5, rel=1e-6)
    assert second_moment_gain(F.relu6) == pytest.approx(math.sqrt(2), rel=1e-6)
    assert second_moment_gain(lambda z: z) == pytest.approx(1.0, rel=1e-9)
    assert second_moment_gain(torch.zeros_like) == math.inf


def test_settings_of_an_activation_count() -> None:
    steep = module_activation(nn.ELU(alpha=3.0))
    plain = module_activation(nn.ELU())
    assert steep is not None
    assert plain is not None
    assert steep.gain < plain.gain
    inplace = module_activation(nn.ReLU(inplace=True))
    assert inplace is not None
    assert inplace.gain == pytest.approx(math.sqrt(2))


def test_learned_and_random_slopes_use_their_mean() -> None:
    prelu = module_activation(nn.PReLU(num_parameters=4, init=0.5))
    rrelu = module_activation(nn.RReLU(0.4, 0.6))
    expected = nn.init.calculate_gain("leaky_relu", 0.5)
    assert prelu is not None
    assert rrelu is not None
    assert prelu.gain == pytest.approx(expected, rel=1e-6)
    assert rrelu.gain == pytest.approx(expected, rel=1e-6)


def test_every_name_is_an_activation_in_all_spellings() -> None:
    for name in ACTIVATION_NAMES:
        assert 0 < gain(name) < 3
    assert named_activation("leaky_relu_") == named_activation("leaky_relu")
    assert gain("LeakyReLU") == gain("leaky_relu")
    assert named_activation("linear") is None
    assert named_activation("softmax") is None


def test_other_modules_of_the_same_file_are_not_activations() -> None:
    assert module_activation(nn.Softmax(dim=1)) is None
    assert module_activation(nn.MultiheadAttention(4, 2)) is None
    assert module_activation(nn.Linear(2, 2)) is None


def test_a_subclass_is_what_it_derives_from() -> None:
    class MyGELU(nn.GELU):
        pass

    assert module_activation(MyGELU()) == module_activation(nn.GELU())


def test_hooks_of_the_module_do_not_run() -> None:
    module = nn.Tanh()
    gelu = nn.GELU()
    calls: list[str] = []
    for each in (module, gelu):
        each.register_forward_hook(lambda *_: calls.append("called"))
        assert module_activation(each) is not None
    assert not calls
