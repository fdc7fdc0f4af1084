from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.models._recurrent import CellName, PixelRNN, SineRNN

CELLS: list[CellName] = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def pixel_rnn(**options: Any) -> PixelRNN:
    torch.manual_seed(0)
    return PixelRNN(torch.Size([1, 4, 4]), 3, optimizer, **{"hidden_size": 8, **options})


def sine_rnn(**options: Any) -> SineRNN:
    torch.manual_seed(0)
    return SineRNN(torch.Size([12, 1]), 2, optimizer, **{"hidden_size": 8, **options})


def activations(cell: CellName, gates: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step by the textbook: the new hidden and cell state from the gates' sums."""
    if cell == "lstm":
        i, f, g, o = gates.chunk(4)
        state = f.sigmoid() * state + i.sigmoid() * g.tanh()
        return o.sigmoid() * state.tanh(), state
    return (gates.tanh() if cell == "rnn_tanh" else gates.relu()), state


@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh", "rnn_relu"])
def test_pixels_are_read_one_by_one_in_order(cell: CellName) -> None:
    model = pixel_rnn(cell=cell)
    weights = dict(model.recurrent.named_parameters())
    image = torch.randn(4, 4)
    hidden = state = torch.zeros(8)
    for pixel in image.flatten():
        gates = weights["weight_ih_l0"][:, 0] * pixel + weights["bias_ih_l0"]
        gates = gates + weights["weight_hh_l0"] @ hidden + weights["bias_hh_l0"]
        hidden, state = activations(cell, gates, hidden, state)
    torch.testing.assert_close(model(image.reshape(1, 1, 4, 4))[0], model.head(hidden))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("make", [pixel_rnn, sine_rnn])
def test_cell_and_size_are_options(make: Any, cell: CellName) -> None:
    model = make(cell=cell, hidden_size=5, num_layers=2)
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell, nn.RNN)
    assert type(model.recurrent) is kind
    assert (model.recurrent.hidden_size, model.recurrent.num_layers) == (5, 2)
    if kind is nn.RNN:
        assert model.recurrent.nonlinearity == cell.removeprefix("rnn_")


def test_the_default_is_an_lstm_and_then_a_linear_layer_drawn_from_one_stream() -> None:
    model = pixel_rnn()
    torch.manual_seed(0)
    expected = [*nn.LSTM(1, 8, batch_first=True).parameters(), *nn.Linear(8, 3).parameters()]
    for parameter, other in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("make", [pixel_rnn, sine_rnn])
def test_recurrent_std_is_that_of_the_hidden_to_hidden_weights_alone(make: Any) -> None:
    model, default = make(hidden_size=64, num_layers=2, recurrent_std=0.25), make(hidden_size=64, num_layers=2)
    for layer in (0, 1):
        assert abs(getattr(model.recurrent, f"weight_hh_l{layer}").std().item() - 0.25) < 0.01
        assert torch.equal(
            getattr(model.recurrent, f"weight_ih_l{layer}"), getattr(default.recurrent, f"weight_ih_l{layer}")
        )


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_standard_deviation_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match=f"`recurrent_std` must be a finite number > 0 or None, got {std}"):
        pixel_rnn(recurrent_std=std)


def test_careless_recurrent_weights_kill_the_relu_network_at_once() -> None:
    torch.manual_seed(0)
    model = PixelRNN(torch.Size([1, 8, 8]), 10, optimizer, cell="rnn_relu", recurrent_std=0.25)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert losses[0] > 100  # chance is 2.3
    assert not math.isfinite(losses[1])


def loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=16)


def test_pixel_rnn_learns_and_measures_accuracy() -> None:
    torch.manual_seed(1)
    images = torch.randn(48, 1, 4, 4)
    images[:, 0, -1, -1] = torch.arange(48) % 3 - 1.0  # the last pixel is the class
    labels = torch.arange(48) % 3
    model = pixel_rnn()
    trainer = L.Trainer(max_epochs=40, **QUIET)
    trainer.fit(model, loader(images, labels), loader(images, labels))
    val = trainer.callback_metrics["val/accuracy"].item()
    (scores,) = trainer.test(model, loader(images, labels), verbose=False)
    expected = (model(images).argmax(dim=1) == labels).float().mean().item()
    assert scores["test/accuracy"] == pytest.approx(val) == pytest.approx(expected)
    assert expected > 0.9


def test_sine_rnn_learns_and_measures_the_share_of_variance_over_all_batches() -> None:
    torch.manual_seed(1)
    waves = torch.randn(40, 12, 1)
    values = waves[:, -2:, 0].flip(1)
    model = sine_rnn()
    trainer = L.Trainer(max_epochs=30, **QUIET)
    trainer.fit(model, loader(waves, values), loader(waves, values))
    assert trainer.callback_metrics["train/loss"] < values.var()
    val = trainer.callback_metrics["val/r2"].item()
    (scores,) = trainer.test(model, loader(waves, values), verbose=False)
    with torch.no_grad():
        expected = 1 - (model(waves) - values).square().sum() / (values - values.mean()).square().sum()
    assert scores["test/r2"] == pytest.approx(val) == pytest.approx(expected.item(), abs=1e-5)
    assert expected > 0.5
