"""What the parameters of a model are for, and the fans of their linear maps, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from stability_callbacks.initialization import LayerParameter, Role
from stability_callbacks.initialization._layer_parameters import layer_parameters


def param(model: nn.Module, name: str) -> LayerParameter:
    return {each.name: each for each in layer_parameters(model)}[name]


def roles(model: nn.Module) -> dict[str, Role]:
    return {each.name: each.role for each in layer_parameters(model)}


FANS: list[tuple[nn.Module, float, float]] = [
    (nn.Linear(6, 4), 6, 4),
    (nn.Bilinear(3, 5, 2), 15, 10),
    (nn.Conv1d(6, 4, 3), 18, 12),
    (nn.Conv2d(6, 4, (3, 5)), 90, 60),
    (nn.Conv3d(6, 4, 2), 48, 32),
    (nn.Conv2d(6, 4, 3, stride=2, dilation=2), 54, 36),
    # groups: each output sees in / groups channels, each input reaches out / groups
    (nn.Conv2d(6, 4, 3, groups=2), 27, 18),
    (nn.Conv2d(6, 12, 3, groups=6), 9, 18),
    # transposed: the weight has shape (in, out / groups, ...)
    (nn.ConvTranspose2d(6, 4, 3), 54, 36),
    (nn.ConvTranspose1d(6, 4, 3, groups=2), 9, 6),
    # a stride leaves only some taps for each output: 4 x 4 taps over 2 x 2 positions
    (nn.ConvTranspose2d(6, 4, 4, stride=2), 24, 64),
    (nn.ConvTranspose2d(6, 4, 2, stride=2), 6, 16),
    (nn.ConvTranspose3d(6, 4, (1, 2, 3), stride=(1, 2, 3)), 6, 24),
    # where the stride exceeds the kernel the other outputs are empty: an output that is not has one tap
    (nn.ConvTranspose1d(6, 4, 1, stride=2), 6, 4),
]


@pytest.mark.parametrize(("layer", "fan_in", "fan_out"), FANS, ids=str)
def test_fans(layer: nn.Module, fan_in: float, fan_out: float) -> None:
    weight = param(layer, "weight")
    assert (weight.fan_in, weight.fan_out) == (fan_in, fan_out)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, stride=2), nn.Bilinear(3, 5, 2)], ids=str)
def test_fans_of_ordinary_layers_are_those_of_torch(layer: nn.Module) -> None:
    weight = param(layer, "weight")
    assert isinstance(layer.weight, torch.Tensor)
    assert (weight.fan_in, weight.fan_out) == nn.init._calculate_fan_in_and_fan_out(layer.weight)


def test_fan_in_of_a_transposed_convolution_is_what_an_output_sums_over() -> None:
    layer = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    sums = layer(torch.ones(1, 6, 8, 8))[0, 0, 2:-2, 2:-2]
    assert (sums == param(layer, "weight").fan_in).all()


@pytest.mark.parametrize(
    ("layer", "gates"), [(nn.RNN(3, 5), 1), (nn.GRU(3, 5), 3), (nn.LSTM(3, 5), 4)], ids=["rnn", "gru", "lstm"]
)
def test_recurrent_layers_have_a_linear_map_for_each_gate(layer: nn.Module, gates: int) -> None:
    assert roles(layer) == {
        "weight_ih_l0": Role.KERNEL,
        "weight_hh_l0": Role.HIDDEN_KERNEL,
        "bias_ih_l0": Role.BIAS,
        "bias_hh_l0": Role.BIAS,
    }
    kernel = param(layer, "weight_ih_l0")
    assert (kernel.blocks, kernel.fan_in, kernel.fan_out) == (gates, 3, 5)


def test_all_parameters_of_a_large_lstm_are_known() -> None:
    lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2)
    found = roles(lstm)
    assert len(found) == 2 * 2 * 5
    assert Role.UNKNOWN not in found.values()
    upper = param(lstm, "weight_ih_l1_reverse")
    assert (upper.blocks, upper.fan_in, upper.fan_out) == (4, 4, 5)
    projection = param(lstm, "weight_hr_l0")
    assert (projection.role, projection.blocks, projection.fan_in) == (Role.HIDDEN_KERNEL, 1, 5)


@pytest.mark.parametrize("cell", [nn.RNNCell(3, 5), nn.GRUCell(3, 5), nn.LSTMCell(3, 5)], ids=str)
def test_cells_are_known(cell: nn.Module) -> None:
    assert set(roles(cell).values()) == {Role.KERNEL, Role.HIDDEN_KERNEL, Role.BIAS}


def test_attention_with_one_or_three_projections() -> None:
    joint = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert roles(joint) == {
        "in_proj_weight": Role.KERNEL,
        "in_proj_bias": Role.BIAS,
        "bias_k": Role.EMBEDDING,
        "bias_v": Role.EMBEDDING,
        "out_proj.weight": Role.KERNEL,
        "out_proj.bias": Role.BIAS,
    }
    stacked = param(joint, "in_proj_weight")
    assert (stacked.blocks, stacked.fan_in, stacked.fan_out) == (3, 8, 8)
    apart = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
    key = param(apart, "k_proj_weight")
    assert (key.role, key.blocks, key.fan_in, key.fan_out) == (Role.KERNEL, 1, 5, 8)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True)],
)
def test_norms_have_scale_and_shift(norm: nn.Module) -> None:
    assert roles(norm) == {"weight": Role.NORM_SCALE, "bias": Role.NORM_SHIFT}


def test_other_layers() -> None:
    assert roles(nn.RMSNorm(3)) == {"weight": Role.NORM_SCALE}
    assert roles(nn.Embedding(3, 2)) == {"weight": Role.EMBEDDING}
    assert roles(nn.EmbeddingBag(3, 2)) == {"weight": Role.EMBEDDING}
    assert roles(nn.PReLU()) == {"weight": Role.ACTIVATION_SLOPE}


class Custom(nn.Linear):
    """A user's layer on top of one of torch's, with a 0-dim parameter of its own."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.temperature = nn.Parameter(torch.ones(()))


def test_parameters_of_unknown_layers_are_unknown() -> None:
    found = roles(nn.Sequential(Custom()))
    assert found == {"0.weight": Role.KERNEL, "0.bias": Role.BIAS, "0.temperature": Role.UNKNOWN}


class Compiled(nn.Module):
    """Holds a module as torch.compile does, whose own class is slow to import."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_names_go_without_the_segments_of_wrappers() -> None:
    model = Compiled(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))))
    assert [name for name, _ in model.named_parameters()] != ["0.weight", "0.bias"]
    assert [each.name for each in layer_parameters(model)] == ["0.weight", "0.bias"]


def test_a_tied_parameter_has_a_slot_for_each_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    first, second = layer_parameters(model)
    assert (first.name, second.name) == ("0.weight", "1.weight")
    assert first.tensors[0] is second.tensors[0]


def test_a_parametrised_weight_is_one_slot() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    assert roles(model) == {"0.weight": Role.KERNEL, "0.bias": Role.BIAS}
    weight = param(model, "0.weight")
    assert weight.shape == (2, 3)
    assert [tuple(tensor.shape) for tensor in weight.tensors] == [(2, 1), (2, 3)]
    assert torch.equal(weight.read(), model[0].weight)


def test_a_lazy_parameter_has_no_shape() -> None:
    assert param(nn.LazyLinear(2), "weight").shape is None
