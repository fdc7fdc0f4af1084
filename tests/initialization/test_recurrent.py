"""Recurrent layers: orthogonal and Xavier gate by gate, and an open forget gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.initialization import Recurrent

LAYERS: dict[str, tuple[nn.Module, int]] = {
    "rnn": (nn.RNN(24, 16, num_layers=2, bidirectional=True), 1),
    "relu rnn": (nn.RNN(24, 16, nonlinearity="relu"), 1),
    "gru": (nn.GRU(24, 16, num_layers=2), 3),
    "lstm": (nn.LSTM(24, 16, num_layers=2, bidirectional=True), 4),
    "rnn cell": (nn.RNNCell(24, 16), 1),
    "gru cell": (nn.GRUCell(24, 16), 3),
    "lstm cell": (nn.LSTMCell(24, 16), 4),
}


def named(layer: nn.Module, start: str) -> list[Tensor]:
    found = [parameter.detach() for name, parameter in layer.named_parameters() if name.startswith(start)]
    assert found
    return found


@pytest.fixture(params=LAYERS)
def layer_and_gates(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    return LAYERS[request.param]


def test_hidden_to_hidden_is_orthogonal_in_each_gate(layer_and_gates: tuple[nn.Module, int]) -> None:
    layer, gates = layer_and_gates
    Recurrent().apply(layer)
    for weight in named(layer, "weight_hh"):
        assert weight.shape == (gates * 16, 16)
        for gate in weight.chunk(gates):
            torch.testing.assert_close(gate @ gate.T, torch.eye(16), atol=1e-5, rtol=0)
        if gates > 1:  # the gates are drawn one by one
            assert not torch.equal(weight[:16], weight[16:32])


def test_input_to_hidden_is_xavier_in_each_gate(layer_and_gates: tuple[nn.Module, int]) -> None:
    layer, gates = layer_and_gates
    Recurrent().apply(layer)
    for weight in named(layer, "weight_ih"):
        bound = (6 / (weight.shape[1] + 16)) ** 0.5
        for gate in weight.chunk(gates):
            assert 0.95 * bound < float(gate.abs().max()) <= bound
            assert float(gate.std()) == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("forget_bias", [1.0, 2.5, -1.0, 0.0])
@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.LSTMCell(3, 4)], ids=str)
def test_both_biases_together_are_the_forget_bias(layer: nn.Module, forget_bias: float) -> None:
    Recurrent(forget_bias=forget_bias).apply(layer)
    for of_input, of_hidden in zip(named(layer, "bias_ih"), named(layer, "bias_hh"), strict=True):
        gates = (of_input + of_hidden).unflatten(0, (4, 4))
        assert gates.tolist() == [[0.0] * 4, [forget_bias] * 4, [0.0] * 4, [0.0] * 4]
        assert not of_hidden.any()


def test_the_forget_gate_is_the_one_that_torch_uses() -> None:
    cell = nn.LSTMCell(3, 4)
    Recurrent(forget_bias=50.0).apply(cell)
    memory = torch.randn(2, 4)
    _, kept = cell(torch.zeros(2, 3), (torch.zeros(2, 4), memory))
    torch.testing.assert_close(kept, memory)  # all of it is remembered, and nothing added


@pytest.mark.parametrize("layer", [nn.GRU(3, 4), nn.RNN(3, 4), nn.GRUCell(3, 4)], ids=str)
def test_other_layers_get_zero_biases(layer: nn.Module) -> None:
    Recurrent(forget_bias=5.0).apply(layer)
    assert not any(bias.any() for bias in named(layer, "bias"))


def test_an_lstm_without_biases_says_so() -> None:
    report = Recurrent().apply(nn.LSTM(3, 4, bias=False))
    assert report["weight_hh_l0"].what == "orthogonal per block (4), gain 1; no bias, so no forget bias"
    assert "forget" not in Recurrent().apply(nn.GRU(3, 4, bias=False))["weight_hh_l0"].what


def test_projection_is_semi_orthogonal() -> None:
    lstm = nn.LSTM(5, 8, proj_size=3, num_layers=2)
    Recurrent().apply(lstm)
    for weight in named(lstm, "weight_hr"):
        torch.testing.assert_close(weight @ weight.T, torch.eye(3), atol=1e-5, rtol=0)
    for weight in named(lstm, "weight_hh"):
        for gate in weight.chunk(4):
            torch.testing.assert_close(gate.T @ gate, torch.eye(3), atol=1e-5, rtol=0)


def test_the_layer_still_runs() -> None:
    lstm = nn.LSTM(5, 8, num_layers=2, bidirectional=True)
    Recurrent().apply(lstm)
    output, _ = lstm(torch.randn(7, 2, 5))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())


def test_gradients_live_through_time() -> None:
    """The gradient that arrives at the first of 64 steps, relative to the last."""

    def ratio(initialize: bool) -> float:
        torch.manual_seed(1)
        lstm = nn.LSTM(1, 64, batch_first=True)
        if initialize:
            Recurrent().apply(lstm)
        inputs = torch.rand(16, 64, 1, requires_grad=True)
        output, _ = lstm(inputs)
        output[:, -1].sum().backward()
        assert inputs.grad is not None
        norms = inputs.grad.norm(dim=(0, 2))
        return float(norms[0] / norms[-1])

    assert ratio(initialize=True) > 1e-4
    assert ratio(initialize=False) < 1e-8


def test_only_recurrent_layers_are_written() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    report = Recurrent().apply(model)
    assert [row.name for row in report if not row.initialized] == ["head.weight", "head.bias"]
    assert report["head.weight"].what == "left alone: Linear is not recurrent"


@pytest.mark.parametrize(("value", "error"), [("1", TypeError), (True, TypeError), (float("inf"), ValueError)])
def test_bad_forget_bias_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"`forget_bias` must be a .*number"):
        Recurrent(forget_bias=value)
