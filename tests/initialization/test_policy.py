"""The manners that all policies share: what they write, what they leave alone, and that nothing else changes."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from stability_callbacks.initialization import (
    Auto,
    CallGraph,
    Initializer,
    InitReport,
    Kaiming,
    LayerParameter,
    Normal,
    Orthogonal,
    Policy,
    Role,
    Xavier,
    constant,
)


class Everything(Policy):
    """Writes the same number into each parameter that can be written."""

    def __init__(self, value: float = 5.0) -> None:
        self.value = value

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | None:
        return constant(self.value)


def what(report: InitReport) -> dict[str, str]:
    return {row.name: row.what for row in report}


def test_parameters_keep_their_identity() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Everything().apply(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]
        assert parameter.grad is None
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert all((held == 5).all() for held in optimizer.param_groups[0]["params"])


def test_report_has_a_row_for_each_parameter_with_true_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = Normal(std=0.7).apply(model)
    assert [row.name for row in report] == list(before)
    for row in report:
        after = model.get_parameter(row.name).detach()
        assert row.shape == tuple(after.shape)
        assert row.mean_before == pytest.approx(float(before[row.name].double().mean()), abs=1e-6)
        assert row.std_before == pytest.approx(float(before[row.name].double().std(correction=0)), abs=1e-6)
        assert row.mean_after == pytest.approx(float(after.double().mean()), abs=1e-6)
        assert row.std_after == pytest.approx(float(after.double().std(correction=0)), abs=1e-6)


def test_a_seed_gives_the_same_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LSTM(8, 8), nn.Embedding(3, 4))
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        Auto().apply(model)
        states.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_nothing_but_parameters_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU())
    model[1].eval()
    fired: list[int] = []
    model.register_forward_hook(lambda *_: fired.append(1))
    model[0].register_forward_pre_hook(lambda *_: fired.append(1))
    buffers = copy.deepcopy(dict(model.named_buffers()))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    Auto().apply(model)
    assert not fired
    assert [module.training for module in model] == [True, False, True, True]
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_finding_activations_draws_no_random_numbers() -> None:
    """The weights depend on the seed alone, not on what the forward methods draw while they are read."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + torch.rand(()))

    model = Noisy()
    torch.manual_seed(0)
    Auto().apply(model)
    torch.manual_seed(0)
    expected = torch.empty(4, 4).normal_(0, math.sqrt(2 / 4))
    torch.testing.assert_close(model.layer.weight.detach(), expected)


def test_tied_parameters_are_written_once_under_their_first_name() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    report = Auto().apply(model)
    assert what(report) == {
        "embedding.weight": "normal, std 0.5",
        "head.weight": "left alone: tied to embedding.weight",
    }
    assert report["head.weight"].std_after == report["embedding.weight"].std_after


def test_a_tied_parameter_is_written_by_the_first_name_with_a_rule() -> None:
    class Holder(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.kept = weight

    layer = nn.Linear(4, 4, bias=False)
    report = Xavier().apply(nn.ModuleDict({"holder": Holder(layer.weight), "layer": layer}))
    assert report["holder.kept"].what == "left alone: tied to layer.weight"
    assert report["layer.weight"].initialized


def test_shared_modules_are_written_once() -> None:
    layer = nn.Linear(4, 4)
    report = Xavier().apply(nn.ModuleList([layer, layer]))
    assert what(report)["1.weight"] == "left alone: tied to 0.weight"


def test_frozen_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    report = Everything().apply(model)
    assert what(report)["0.weight"] == "left alone: frozen"
    assert torch.equal(model[0].weight, before)
    assert (model[1].weight == 5).all()


def test_parameters_without_a_rule_say_why() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3))

    report = Xavier().apply(nn.Sequential(Custom(), nn.BatchNorm1d(3)))
    assert what(report) == {
        "0.table": "left alone: not a parameter that Custom is known for",
        "1.weight": "left alone: norm scale kept, Xavier has no rule for it",
        "1.bias": "left alone: norm shift kept, Xavier has no rule for it",
    }


def test_scalars_vectors_and_empty_parameters() -> None:
    model = nn.ParameterDict({"scalar": torch.ones(()), "vector": torch.ones(3), "empty": torch.ones(0, 3)})
    report = Everything().apply(model)
    assert what(report) == {"scalar": "5", "vector": "5", "empty": "left alone: empty"}
    assert model["scalar"] == 5
    assert math.isnan(report["empty"].mean_after)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's own, when the layer is made
def test_a_layer_without_inputs() -> None:
    assert what(Kaiming().apply(nn.Linear(0, 3))) == {"weight": "left alone: empty", "bias": "zeros"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_get_the_same_values_cast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    reference = nn.ModuleDict({"lstm": nn.LSTM(6, 5), "linear": nn.Linear(6, 5)})
    other = copy.deepcopy(reference).to(dtype)
    for model in (reference, other):
        torch.manual_seed(1)
        Auto().apply(model)
    if dtype == torch.float64:  # drawn in float64
        gate = other["lstm"].weight_hh_l0.detach()[:5]
        torch.testing.assert_close(gate @ gate.T, torch.eye(5, dtype=dtype), atol=1e-12, rtol=0)
    else:
        for name, parameter in reference.named_parameters():
            assert torch.equal(other.get_parameter(name), parameter.to(dtype)), name


def test_complex_parameters_are_left_alone() -> None:
    report = Xavier().apply(nn.Linear(3, 2, dtype=torch.complex64))
    assert what(report) == {"weight": "left alone: not real-valued", "bias": "left alone: not real-valued"}


def test_memory_format_is_kept() -> None:
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    Normal().apply(layer)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_weight_norm_gets_direction_and_length() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    parameters = dict(layer.named_parameters())
    torch.manual_seed(0)
    report = Normal(std=0.7).apply(layer)
    torch.manual_seed(0)
    expected = torch.empty(4, 6).normal_(0, 0.7)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.parametrizations.weight.original0, expected.norm(dim=1, keepdim=True))
    assert report["weight"].what == "normal, std 0.7; through _WeightNorm"
    assert report["weight"].std_after == pytest.approx(float(expected.std(correction=0)))
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())


def test_weight_norm_storage_is_kept() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    pointers = [parameter.data_ptr() for parameter in layer.parameters()]
    Normal().apply(layer)
    assert [parameter.data_ptr() for parameter in layer.parameters()] == pointers


def test_spectral_norm_knows_the_new_weight_at_once() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(64, 64))
    layer.train()
    Normal(std=1.0).apply(layer)
    assert layer.parametrizations.weight.training
    layer.eval()
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, rel=0.05)
    assert float(layer.parametrizations.weight.original.detach().std()) == pytest.approx(1.0, rel=0.05)


def test_reading_a_weight_for_the_report_does_not_move_spectral_norm() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(8, 8))
    layer.parametrizations.weight.original.requires_grad_(False)
    buffers = copy.deepcopy(dict(layer.named_buffers()))
    report = Normal().apply(layer)
    assert what(report)["weight"] == "left alone: frozen"
    torch.testing.assert_close(dict(layer.named_buffers()), buffers, rtol=0, atol=0)
    assert layer.training


@pytest.mark.parametrize("method", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_parametrization_stays_orthogonal(method: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=method)
    before = layer.weight.detach().clone()
    Xavier().apply(layer)
    weight = layer.weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)
    assert not torch.allclose(weight, before)


def test_parametrizations_that_cannot_be_assigned_to_are_left_alone() -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).T

    model = nn.Sequential(
        nn.Linear(4, 4, bias=False),
        parametrizations.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="cayley", use_trivialization=False),
    )
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    before = copy.deepcopy(model.state_dict())
    report = Xavier().apply(model)
    assert what(report) == {
        "0.weight": "left alone: Symmetric has no right_inverse",
        "1.weight": "left alone: its parametrization cannot be assigned to",
    }
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_parametrised_recurrent_weights() -> None:
    lstm = parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    Orthogonal().apply(lstm)
    for gate in lstm.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(3), atol=1e-5, rtol=0)


def test_lazy_parameters_are_left_alone_with_a_warning() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"lazy and were not initialized: 0\.weight, 0\.bias.*Run a batch"):
        report = Auto().apply(model)
    assert report["0.weight"].shape is None
    assert report["0.weight"].what.startswith("left alone: lazy")
    assert report["2.weight"].initialized
    model(torch.ones(1, 5))
    assert Auto().apply(model)["0.weight"].what.startswith("Kaiming")


def test_meta_parameters_are_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"meta device, got '1\.weight'.*to_empty"):
        Everything().apply(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("policy", [Xavier(), Auto()])
def test_empty_storage_is_filled(policy: Policy) -> None:
    model = nn.Linear(3, 3, device="meta").to_empty(device="cpu")
    nn.init.constant_(model.weight, math.nan)
    policy.apply(model)
    assert model.weight.isfinite().all()


def test_weights_hidden_by_sharding_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks what it took away
    with pytest.raises(ValueError, match="must not be sharded by FSDP1 or DeepSpeed ZeRO-3, got 'weight'"):
        Xavier().apply(model)


@pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.Linear(2, 2)]])
def test_a_model_must_be_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module"):
        Xavier().apply(model)


def test_a_model_without_parameters_has_an_empty_report() -> None:
    assert len(Auto().apply(nn.ReLU())) == 0


def test_bare_parameters_as_a_model() -> None:
    report = Auto().apply(nn.Linear(3, 2))
    assert what(report)["weight"] == "Xavier uniform, gain 1 (no activation found after it)"


def test_policies_of_ones_own_see_roles_and_fans() -> None:
    class LeCun(Policy):
        def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | None:
            if param.role is not Role.KERNEL:
                return None
            return Initializer("LeCun", lambda tensor: tensor.normal_(0, param.fan_in**-0.5))

    layer = nn.Linear(400, 100)
    report = LeCun().apply(layer)
    assert what(report) == {"weight": "LeCun", "bias": "left alone: bias kept, LeCun has no rule for it"}
    assert float(layer.weight.detach().std()) == pytest.approx(1 / 20, rel=0.03)


def test_pretrained_parts_are_left_alone_by_auto_only() -> None:
    body = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    body.config = SimpleNamespace(_name_or_path="org/checkpoint")
    model = nn.ModuleDict({"body": body, "head": nn.Linear(3, 2)})
    report = Auto().apply(model)
    assert what(report)["body.0.weight"] == "left alone: pretrained, from org/checkpoint"
    assert report["head.weight"].initialized
    assert Xavier().apply(model)["body.0.weight"].initialized
    body.config = SimpleNamespace(_name_or_path="")
    assert Auto().apply(model)["body.0.weight"].initialized


@pytest.mark.parametrize("set_up_first", [False, True])
def test_in_fabric(set_up_first: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if not set_up_first:
        Auto().apply(model)
    wrapped, optimizer = fabric.setup(model, optimizer)
    if set_up_first:
        report = Auto().apply(wrapped)
        assert sum(row.initialized for row in report) == 4
        assert "before ReLU" in report.rows[0].what
    assert not model[0].bias.any()
    fabric.backward(wrapped(torch.randn(8, 4)).square().mean())
    optimizer.step()
    assert model[2].bias.any()
