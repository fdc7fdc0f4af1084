"""Initialization by data: every layer's output has variance 1, and nothing but weights changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stability_callbacks.initialization import LSUV


def output_variances(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, float]:
    """Variance of each linear layer's and convolution's output."""
    found: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            layer.register_forward_hook(
                lambda _, __, output, name=name: found.update({name: float(output.detach().float().var(correction=0))})
            )
    model(*inputs, **named)
    return found


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2),
        nn.Hardshrink(1.5),  # no theory knows its gain
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def test_every_layer_has_variance_one() -> None:
    model = network()
    images = 50 + 20 * torch.rand(16, 3, 8, 8)
    report = LSUV(tolerance=0.01).apply(model, images)
    variances = output_variances(model, images)
    assert len(variances) == 4
    assert all(abs(variance - 1) <= 0.011 for variance in variances.values()), variances
    assert report["7.weight"].what.startswith("orthogonal, gain 1, then scaled: output std ")
    assert report["7.weight"].std_after == pytest.approx(float(model[7].weight.detach().std(correction=0)), rel=1e-5)
    assert report["7.bias"].what == "zeros"
    assert report["1.weight"].what.startswith("left alone")


def test_the_matrices_stay_orthogonal_up_to_scale() -> None:
    model = network()
    LSUV().apply(model, torch.randn(16, 3, 8, 8))
    weight = model[7].weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(32), atol=1e-4, rtol=0)


def test_nothing_but_parameters_changes() -> None:
    model = network().train()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    torch.nn.init.normal_(torch.empty(1))
    LSUV().apply(model, torch.randn(16, 3, 8, 8))
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in model)
    assert not torch.equal(torch.get_rng_state(), state)  # the weights were drawn from it


def test_dropout_of_the_pass_draws_from_a_copy_of_the_random_state() -> None:
    def state_after(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        LSUV().apply(model, torch.ones(4, 8))
        return torch.get_rng_state()

    with_dropout = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    without = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8))
    assert torch.equal(state_after(with_dropout), state_after(without))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.one(input=x)
        return self.two(x if scale is None else x * scale)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "mapping"])
def test_forms_of_a_batch(form: str) -> None:
    model, x = Keywords(), torch.randn(64, 4)
    scale = torch.full((4,), 30.0)
    batch = {"tensor": x, "tuple": (x, torch.zeros(64)), "list": [x], "mapping": {"x": x, "scale": scale}}[form]
    LSUV(tolerance=0.01).apply(model, batch)
    inputs = {"x": x, "scale": scale} if form == "mapping" else {"x": x}
    assert all(abs(variance - 1) <= 0.011 for variance in output_variances(model, **inputs).values())


def test_a_shared_layer_is_scaled_by_its_first_call() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.Softsign(), layer)
    x = 7 * torch.randn(64, 16)
    LSUV(tolerance=0.01).apply(model, x)
    assert float(layer(x).detach().var()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).to(dtype)
    x = 5 * torch.rand(128, 32, dtype=dtype)
    LSUV().apply(model, x)
    assert all(abs(variance - 1) <= 0.1 for variance in output_variances(model, x).values())


def test_weight_norm_is_scaled_through_its_parametrization() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 16))
    x = 9 * torch.randn(64, 16)
    LSUV(tolerance=0.01).apply(model, x)
    assert all(abs(variance - 1) <= 0.011 for variance in output_variances(model, x).values())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_older_weight_norm_is_scaled_by_its_magnitudes(dim: int | None) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv1d(3, 8, 3), dim=dim), nn.ReLU(), nn.utils.weight_norm(nn.Conv1d(8, 5, 2), dim=dim)
    )
    direction, x = model[0].weight_v.detach().clone(), 40 * torch.rand(32, 3, 9) + 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = LSUV().apply(model, x)
    for number in (1, 3):
        assert model[:number](x).var(correction=0).item() == pytest.approx(1, abs=0.1)
    assert report["0.weight_g"].what == "scaled: output std 1"
    assert report["0.weight_g"].initialized
    assert torch.equal(model[0].weight_v, direction)
    assert {"weight_g", "weight_v"} < set(model[0]._parameters)


def test_a_weight_that_a_hook_makes_is_named() -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match=r"0\.weight \(its weight is no parameter: a hook makes it\)"):
        report = LSUV().apply(model, torch.randn(20, 4))
    assert report["0.weight_orig"].what == "left alone: its weight is no parameter: a hook makes it"
    assert "scaled" in report["2.weight"].what


def test_layers_that_do_not_converge_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = parametrizations.spectral_norm(nn.Linear(8, 8))
            self.dead, self.unused, self.fine = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fixed(x) + self.dead(0 * x) + self.fine(x)

    with pytest.warns(UserWarning, match="did not bring these layers to variance 1") as caught:
        report = LSUV().apply(Odd(), 30 * torch.randn(32, 8))
    message = str(caught[0].message)
    assert "fixed.weight (its output did not follow the weight)" in message
    assert "dead.weight (its output is constant)" in message
    assert "unused.weight (the forward pass did not call its layer)" in message
    assert "fine" not in message
    assert report["dead.weight"].what == "orthogonal, gain 1, not scaled to variance 1: its output is constant"
    assert "then scaled" in report["fine.weight"].what


def test_non_finite_inputs_are_named_and_spoil_no_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="its output is not finite"):
        LSUV().apply(model, torch.full((8, 4), float("nan")))
    assert model[0].weight.isfinite().all()


def test_frozen_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8))
    before = model[0].weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = LSUV().apply(model, torch.randn(32, 8))
    assert torch.equal(model[0].weight, before)
    assert report["0.weight"].what == "left alone: frozen"


def test_hooks_and_buffers_are_put_back_when_the_model_fails() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(self.norm(x))
            raise RuntimeError("boom")

    model = Failing()
    with pytest.raises(RuntimeError, match="boom"):
        LSUV().apply(model, torch.randn(8, 4) + 5)
    assert not model.layer._forward_hooks
    assert not model.norm.running_mean.any()
    assert model.norm.num_batches_tracked == 0


def test_a_batch_is_needed() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.clone()
    with pytest.raises(ValueError, match="`batch` must be a batch of inputs for LSUV"):
        LSUV().apply(model)
    assert torch.equal(model.weight, before)
    assert LSUV.needs_batch


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": 0}, ValueError, "`tolerance` must be a number > 0"),
        ({"tolerance": "x"}, TypeError, "`tolerance` must be a number"),
        ({"max_iterations": 0}, ValueError, "`max_iterations` must be an integer >= 1"),
        ({"max_iterations": 1.5}, TypeError, "`max_iterations` must be an integer"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSUV(**arguments)


def test_copies_and_pickles() -> None:
    assert repr(copy.deepcopy(LSUV(0.2))) == "LSUV(tolerance=0.2, max_iterations=10)"
    assert vars(pickle.loads(pickle.dumps(LSUV(0.2)))) == vars(LSUV(0.2))
