from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recipes.gradient_flow._through_time import NETWORKS, gradient_norms, gradient_through_time, measure, sheet, spread
from recipes.models._recurrent import CellName, PixelRNN

Array = NDArray[np.float64]
PIXELS, BATCH, CLASSES, HIDDEN = 9, 4, 3, 5


def problem(cell: CellName) -> tuple[PixelRNN, torch.Tensor, torch.Tensor, dict[str, Array]]:
    torch.manual_seed(3)
    model = PixelRNN(torch.Size([1, 3, 3]), CLASSES, torch.optim.Adam, cell=cell, hidden_size=HIDDEN).double()
    images, labels = torch.randn(BATCH, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return model, images, labels, weights


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    share: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return share


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def test_against_backpropagation_through_time_by_hand() -> None:
    model, images, labels, w = problem("rnn_tanh")
    x = images.flatten(1).numpy()
    bias = w["recurrent.bias_ih_l0"] + w["recurrent.bias_hh_l0"]
    states = [np.zeros((BATCH, HIDDEN))]
    for t in range(PIXELS):
        sums = x[:, t, None] @ w["recurrent.weight_ih_l0"].T + states[-1] @ w["recurrent.weight_hh_l0"].T + bias
        states.append(np.tanh(sums))
    error = softmax(states[-1] @ w["head.weight"].T + w["head.bias"])
    error[np.arange(BATCH), labels.numpy()] -= 1
    down = (error / BATCH) @ w["head.weight"]
    norms = np.zeros(PIXELS)
    for t in reversed(range(PIXELS)):
        sums = down * (1 - states[t + 1] ** 2)
        norms[t] = np.linalg.norm(sums @ w["recurrent.weight_ih_l0"])
        down = sums @ w["recurrent.weight_hh_l0"]
    assert np.log10(norms).max() - np.log10(norms).min() > 1  # something vanishes
    np.testing.assert_allclose(gradient_norms(model, images, labels).numpy(), norms, rtol=1e-10)


def lstm_loss(w: dict[str, Array], x: Array, labels: Array) -> float:
    h = c = np.zeros((len(x), HIDDEN))
    bias = w["recurrent.bias_ih_l0"] + w["recurrent.bias_hh_l0"]
    for t in range(x.shape[1]):
        gates = x[:, t, None] @ w["recurrent.weight_ih_l0"].T + h @ w["recurrent.weight_hh_l0"].T + bias
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    logits = h @ w["head.weight"].T + w["head.bias"]
    return float(-np.log(softmax(logits)[np.arange(len(x)), labels]).mean())


def test_against_finite_differences_of_an_lstm_by_hand() -> None:
    model, images, labels, w = problem("lstm")
    x, step = images.flatten(1).numpy(), 1e-5
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[place] = step
        gradient[place] = lstm_loss(w, x + moved, labels.numpy()) - lstm_loss(w, x - moved, labels.numpy())
    norms = np.linalg.norm(gradient / (2 * step), axis=0)
    np.testing.assert_allclose(gradient_norms(model, images, labels).numpy(), norms, rtol=1e-5)


@pytest.fixture(scope="module")
def curves() -> dict[str, torch.Tensor]:
    return measure(NETWORKS, seeds=range(3))


def test_curves_start_at_the_last_pixel_and_end_at_the_first(curves: dict[str, torch.Tensor]) -> None:
    for curve in curves.values():
        assert curve.shape == (64,)
        assert curve[0] == 1
        assert (curve > 0).all()


def test_who_vanishes_and_who_explodes(curves: dict[str, torch.Tensor]) -> None:
    # Orders of magnitude, as measured before this code was written.
    end = {name: float(curve[-1].log10()) for name, curve in curves.items()}
    assert end["LSTM, default"] == pytest.approx(-13, abs=1.5)
    assert end["LSTM, orthogonal, forget bias 0"] == pytest.approx(-9, abs=1.5)
    assert end["LSTM, orthogonal, forget bias 1"] == pytest.approx(-1.3, abs=1)
    assert end["LSTM, orthogonal, forget bias 2"] == pytest.approx(1.3, abs=1)
    assert end["tanh RNN, default"] == pytest.approx(-14.3, abs=1.5)
    assert end["tanh RNN, orthogonal"] == pytest.approx(-2.7, abs=1)
    assert end["ReLU RNN, N(0, 0.25)"] == pytest.approx(8.8, abs=2)


def test_curves_are_the_median_over_the_seeds_and_draw_nothing_from_the_global_stream() -> None:
    network = {"GRU, default": NETWORKS["GRU, default"]}
    before = torch.random.get_rng_state()
    single = torch.stack([measure(network, [seed])["GRU, default"] for seed in range(3)])
    together = measure(network, range(3))["GRU, default"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(together, single.median(dim=0).values)
    assert not torch.equal(single[0], single[1])


def test_single_precision_gives_the_same_as_long_as_nothing_underflows() -> None:
    network: dict[str, Any] = {"tanh RNN, orthogonal": NETWORKS["tanh RNN, orthogonal"]}
    (single,), (double,) = (measure(network, [0], dtype=kind).values() for kind in (torch.float32, torch.float64))
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=0)


def test_the_table_goes_from_the_largest_to_the_smallest() -> None:
    rows = sheet({"small": torch.tensor([1.0, 1e-9]), "large": torch.tensor([1.0, 2e3])})
    assert [tuple(cell.text for cell in row) for row in rows.rows] == [("large", "2.0e+03"), ("small", "1.0e-09")]
    assert rows.columns[-1] == "after 1 steps back"


def test_picture_and_table_are_written(tmp_path: Path) -> None:
    picture = gradient_through_time(tmp_path, seeds=[0])
    assert picture == tmp_path / "gradient_through_time.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "gradient_through_time.md").read_text(encoding="utf-8")
    assert all(name in text for name in NETWORKS)


def test_labels_keep_their_distance_and_their_order() -> None:
    assert spread([0.9, 0.5, 0.49, 0.48], gap=0.1) == pytest.approx([0.9, 0.5, 0.4, 0.3])
    assert spread([]) == []
