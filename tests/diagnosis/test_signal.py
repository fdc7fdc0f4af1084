"""The signal report: its numbers against float64 references, its verdicts on networks known to train or to fail."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from stability_callbacks import initialization
from stability_callbacks.diagnosis import KINDS, Finding, SignalFinding, SignalReport, SignalRow, signal_report
from tests.models import assert_same_bits

SILENT = "silent by zero initialisation"


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def vectors(count: int = 32, width: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width), torch.randint(10, (count,))


def mlp(
    depth: int, activation: Callable[[], nn.Module] = nn.ReLU, weights: Any = None, norm: Any = nn.Identity
) -> nn.Sequential:
    """Linear layers of width 64; `weights` initialises them and sets biases to zero, None is PyTorch's default."""
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(64, 64), norm(64), activation())]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    for layer in model:
        if weights is not None and isinstance(layer, nn.Linear):
            weights(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def he(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def normal(std: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: nn.init.normal_(weight, std=std)


class Block(nn.Module):
    """Two convolutions, with or without batch norms and a skip connection."""

    def __init__(self, norm: bool, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(16) if norm else nn.Identity() for _ in range(2))
        he(self.conv1.weight)
        he(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + x if self.skip else out)


def conv_net(blocks: int, norm: bool = True, skip: bool = False) -> nn.Sequential:
    body = [Block(norm, skip) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def zero_residual() -> nn.Module:
    model = conv_net(2, skip=True)
    for block in model[1:3]:
        nn.init.zeros_(block.norm2.weight)
    return model


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 1, 14, 14), torch.randint(10, (16,))


class LanguageModel(nn.Module):
    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 32), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 4, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(x) + self.positions(torch.arange(x.shape[1]))))


def texts() -> tuple[Tensor, Tensor]:
    return torch.randint(50, (8, 16)), torch.randint(50, (8, 16))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 64, 1), torch.randint(10, (16,))


VANISHING, EXPLODING = "vanishing forward, vanishing backward", "exploding forward, exploding backward"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("build", "batch", "verdict"),
    [
        pytest.param(lambda: mlp(30, weights=he), vectors, "healthy", id="ReLU Kaiming"),
        pytest.param(lambda: mlp(30, nn.Tanh, nn.init.xavier_normal_), vectors, "healthy", id="tanh Xavier"),
        pytest.param(lambda: mlp(30, weights=he, norm=nn.LayerNorm), vectors, "healthy", id="layer norm"),
        pytest.param(lambda: mlp(8), vectors, "healthy", id="8 layers by default"),
        pytest.param(lambda: mlp(12), vectors, VANISHING, id="12 layers by default"),
        pytest.param(lambda: mlp(30), vectors, VANISHING, id="30 layers by default"),
        pytest.param(lambda: mlp(100, weights=nn.init.xavier_normal_), vectors, VANISHING, id="100 ReLU Xavier"),
        pytest.param(lambda: mlp(30, nn.Sigmoid, normal(0.01)), vectors, VANISHING, id="sigmoid N(0, .01)"),
        pytest.param(lambda: mlp(30, nn.Sigmoid, nn.init.xavier_normal_), vectors, VANISHING, id="sigmoid Xavier"),
        pytest.param(lambda: mlp(30, nn.ReLU, normal(0.01)), vectors, VANISHING, id="ReLU N(0, .01)"),
        pytest.param(lambda: mlp(30, nn.ReLU, normal(0.001)), vectors, VANISHING, id="ReLU N(0, .001)"),
        pytest.param(lambda: mlp(20, weights=normal(0.3)), vectors, EXPLODING, id="N(0, .3)"),
        pytest.param(lambda: mlp(30, weights=he, norm=nn.BatchNorm1d), vectors, "exploding backward", id="30 BN"),
        pytest.param(lambda: conv_net(20), images, "exploding backward", id="plain 40 BN"),
        pytest.param(lambda: conv_net(10), images, "healthy", id="plain 20 BN"),
        pytest.param(lambda: conv_net(10, skip=True), images, "healthy", id="residual 20 BN"),
        pytest.param(zero_residual, images, "healthy", id="zero residual"),
        pytest.param(LanguageModel, texts, "healthy", id="pre-norm"),
        pytest.param(lambda: LanguageModel(norm_first=False), texts, "healthy", id="post-norm"),
    ],
)
def test_verdict(build: Callable[[], nn.Module], batch: Callable[[], Any], verdict: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, data = build(), batch()
    assert signal_report(model, data, cross_entropy).verdict == verdict
    assert signal_report(model, data).verdict == verdict  # by a random projection of the outputs


def test_skip_connections_without_norms_explode() -> None:
    assert "exploding forward" in signal_report(conv_net(20, norm=False, skip=True), images(), cross_entropy).verdict


def test_a_plain_deep_network_that_will_not_train_is_not_found() -> None:
    """The documented limit: 20 plain convolutions with Kaiming initialisation get stuck with healthy numbers."""
    assert signal_report(conv_net(10, norm=False), images(), cross_entropy).verdict == "healthy"


def test_the_gradient_through_time_is_not_seen() -> None:
    """The documented limit: per layer, a recurrent network is healthy whose first steps get no gradient."""
    model, (inputs, targets) = Recurrent(), sequences()
    assert signal_report(model, (inputs, targets), cross_entropy).verdict == "healthy"
    inputs.requires_grad_()
    cross_entropy(model, (inputs, targets)).backward()
    assert inputs.grad is not None
    assert inputs.grad[:, 0].norm() < 1e-8 * inputs.grad[:, -1].norm()


# ---- the numbers


def linear_network(widths: list[int]) -> nn.Sequential:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


@settings(max_examples=25)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    count=st.integers(2, 7),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_numbers_are_those_of_an_independent_computation(
    widths: list[int], count: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = linear_network(widths)
    inputs = torch.randn(count, widths[0])
    report = signal_report(model, inputs, lambda model, inputs: scale * model(inputs).square().sum())

    weights = [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in model[::2]]
    hidden, outputs = [inputs.double().numpy()], []
    for weight, bias in weights:
        outputs.append(hidden[-1] @ weight.T + bias)
        hidden.append(np.tanh(outputs[-1]))
    gradient = 2 * scale * outputs[-1]
    for place in reversed(range(len(weights))):
        weight, bias = weights[place]
        row = report[str(2 * place)]
        by_weight, by_bias = gradient.T @ hidden[place], gradient.sum(0)
        expected = {
            "activation_mean": outputs[place].mean(),
            "activation_std": outputs[place].std(),
            "signal_std": math.sqrt(outputs[place].var(0).mean()),
            "output_grad_norm": np.linalg.norm(gradient),
            "grad_norm": math.hypot(np.linalg.norm(by_weight), np.linalg.norm(by_bias)),
            "weight_norm": math.hypot(np.linalg.norm(weight), np.linalg.norm(bias)),
        }
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-4, abs=1e-6 * min(scale, 1.0)), name
        assert row.grad_to_weight == pytest.approx(row.grad_norm / row.weight_norm)
        gradient = gradient @ weight * (1 - hidden[place] ** 2)
    assert report.loss == pytest.approx(scale * (outputs[-1] ** 2).sum(), rel=1e-4)
    assert [row.name for row in report] == [str(2 * place) for place in range(len(weights))]


def test_gradients_too_small_to_be_squared_in_float32_have_a_norm() -> None:
    model = nn.Linear(4, 3)
    row = signal_report(model, torch.ones(2, 4), lambda model, inputs: 1e-30 * model(inputs).sum())[""]
    assert row.output_grad_norm == pytest.approx(math.sqrt(6) * 1e-30)
    assert row.grad_norm == pytest.approx(1e-30 * math.sqrt(15 * 4))


class Unrolled(nn.Module):
    """Calls one layer several times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(5, 5)
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.states = []
        for _ in range(4):
            x = self.cell(x)
            x.retain_grad()
            self.states.append(x)
            x = x.tanh()
        return x


def test_calls_of_a_layer_are_taken_together() -> None:
    model, inputs = Unrolled(), 3 * torch.randn(6, 5)
    row = signal_report(model, inputs, lambda model, inputs: model(inputs).square().sum())["cell"]
    model(inputs).square().sum().backward()
    together = torch.stack([state.detach() for state in model.states]).double()
    assert row.calls == 4
    assert row.activation_mean == pytest.approx(float(together.mean()), rel=1e-5)
    assert row.activation_std == pytest.approx(float(together.std(correction=0)), rel=1e-5)
    assert row.signal_std == pytest.approx(float(together.var(1, correction=0).mean().sqrt()), rel=1e-5)
    gradients = torch.stack([state.grad for state in model.states])  # type: ignore[misc]
    assert row.output_grad_norm == pytest.approx(float(gradients.norm()), rel=1e-5)
    assert model.cell.weight.grad is not None
    assert model.cell.bias.grad is not None
    grad_norm = math.hypot(model.cell.weight.grad.norm(), model.cell.bias.grad.norm())
    assert row.grad_norm == pytest.approx(grad_norm, rel=1e-5)


def test_a_bias_is_no_signal() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.zero_()[0, 0] = 1e-9
        model.bias.copy_(torch.arange(4.0))
    row = signal_report(model, torch.randn(64, 4))[""]
    assert row.activation_std > 1
    assert 0 < row.signal_std < 1e-6


def test_activations_in_place_change_no_number() -> None:
    plain, inputs = mlp(4), vectors()
    in_place = copy.deepcopy(plain)
    for each in in_place:
        if isinstance(each, nn.ReLU):
            each.inplace = True
    assert signal_report(in_place, inputs, cross_entropy) == signal_report(plain, inputs, cross_entropy)


# ---- what a model may be


class Forked(nn.Module):
    """Registered in another order than it runs; a frozen layer, an unused one, one cut off, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.detached = nn.Linear(4, 4)
        self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.tied(self.first(x)))
        return self.last(x + self.detached(x).detach()) * self.scale


def test_frozen_unused_and_tied_layers() -> None:
    report = signal_report(Forked(), torch.randn(8, 4))
    assert report.verdict == "detached"
    flags = {row.name: row.flags for row in report if row.flags}
    assert flags == {"frozen": ("frozen",), "unused": ("unused",), "detached": ("detached",)}
    order = ["first", "tied", "frozen", "unused", "detached", "last", ""]
    assert [row.name for row in report] == order
    assert math.isnan(report["frozen"].grad_norm)
    assert report["frozen"].output_grad_norm > 0
    assert report["unused"].calls == 0
    assert math.isnan(report["unused"].activation_std)
    assert report["tied"].grad_norm < report["first"].grad_norm  # the same weight, but no bias
    assert report[""].calls == 1


class Cut(nn.Module):
    """An encoder that no gradient reaches, a head, and how they are parted."""

    def __init__(self, part: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.head, self.part = nn.Linear(4, 1), part

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.encoder, x))


def without_gradient(encoder: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder(x)


def dropped(encoder: nn.Module, x: Tensor) -> Tensor:
    encoder(x)
    return x[:, :4]


PARTED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "detach": lambda encoder, x: encoder(x).detach(),
    "no_grad": without_gradient,
    "argmax": lambda encoder, x: torch.nn.functional.one_hot(encoder(x).argmax(-1), 4).float(),
    "a cast to integers": lambda encoder, x: (10 * encoder(x)).long().float(),
    "data": lambda encoder, x: encoder(x).data * 2,
    "a threshold": lambda encoder, x: (encoder(x) > 0).float(),
    "numpy": lambda encoder, x: torch.from_numpy(encoder(x).detach().numpy()),
    "a list": lambda encoder, x: torch.tensor(encoder(x).tolist()),
}


@pytest.mark.parametrize("how", PARTED)
def test_a_detached_encoder_is_neither_unused_nor_healthy(how: str) -> None:
    torch.manual_seed(0)
    model = Cut(PARTED[how])
    before = {name: each.clone() for name, each in model.named_parameters()}
    report = signal_report(model, torch.randn(16, 5), lambda model, x: model(x).square().mean())
    assert {row.name: row.flags for row in report if row.flags} == dict.fromkeys(
        ("encoder.0", "encoder.2"), ("detached",)
    )
    assert report.verdict == "detached"
    [finding] = report.findings
    assert (finding.severity, finding.layers) == ("warning", ("encoder.0", "encoder.2"))
    assert "detach" in finding.remedy
    assert str(finding).startswith("detached (2 layers, encoder.0 to encoder.2): the loss depends on them")
    assert all(torch.equal(before[name], each) for name, each in model.named_parameters())


def test_what_the_loss_does_not_depend_on_is_unused_and_what_is_frozen_is_frozen() -> None:
    torch.manual_seed(0)
    report = signal_report(Cut(dropped), torch.randn(16, 5), lambda model, x: model(x).square().mean())
    assert {row.name: row.flags for row in report if row.flags} == dict.fromkeys(
        ("encoder.0", "encoder.2"), ("unused",)
    )
    assert report.verdict == "healthy"
    model = Cut(PARTED["detach"])
    model.encoder.requires_grad_(False)
    report = signal_report(model, torch.randn(16, 5))
    assert report["encoder.0"].flags == ("frozen",)
    assert report.verdict == "healthy"


def test_dropout_does_not_make_an_unused_layer_look_detached() -> None:
    model = nn.Sequential(Cut(dropped), nn.Dropout(0.5))
    assert signal_report(model, torch.randn(16, 5)).verdict == "healthy"


def test_a_loss_that_is_a_new_tensor_detaches_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    report = signal_report(
        model, torch.randn(16, 4), lambda model, x: torch.tensor(model(x).mean().item(), requires_grad=True)
    )
    assert report.verdict == "detached"


def test_parameters_that_another_module_uses() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    rows = {row.name: row for row in signal_report(layer, torch.randn(4, 5, 8))}
    assert list(rows) == ["self_attn", "self_attn.out_proj", "norm1", "linear1", "linear2", "norm2"]
    assert rows["self_attn"].activation_std > 0
    assert rows["self_attn.out_proj"].calls == 0
    assert rows["self_attn.out_proj"].grad_norm > 0
    assert not rows["self_attn.out_proj"].flags


class Mapped(nn.Module):
    """Takes several inputs and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Embedding(5, 4)

    def forward(self, numbers: Tensor, tokens: Tensor) -> dict[str, Any]:
        return {"sum": (self.one(numbers), [self.two(tokens)]), "length": 3}


def test_inputs_and_outputs_of_any_shape() -> None:
    batch = {"numbers": torch.randn(6, 3), "tokens": torch.randint(5, (6,))}
    report = signal_report(Mapped(), batch)
    assert [row.output_grad_norm for row in report] == pytest.approx([1.0, 1.0])
    assert signal_report(Mapped(), batch, lambda model, batch: {"loss": model(**batch)["sum"][0].sum()}).loss != 0


def test_the_first_output_of_a_recurrent_layer_counts() -> None:
    rnn = nn.LSTM(3, 4, batch_first=True)
    inputs = torch.randn(5, 7, 3)
    expected = pytest.approx(float(rnn(inputs)[0].detach().std(correction=0)), rel=1e-5)
    assert signal_report(rnn, inputs)[""].activation_std == expected
    packed = pack_padded_sequence(inputs, torch.full((5,), 7), batch_first=True)
    loss = lambda model, packed: model(packed)[0].data.sum()  # noqa: E731
    assert signal_report(rnn, packed, loss)[""].activation_std == expected


def test_parametrised_and_sparse_weights() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), parametrizations.weight_norm(nn.Linear(4, 3)))
    tokens = torch.randint(9, (8, 2))
    report = signal_report(model, tokens, lambda model, tokens: model(tokens).square().sum())
    model(tokens).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert report["0"].grad_norm == pytest.approx(float(gradients["0.weight"].to_dense().norm()), rel=1e-5)
    own = [float(gradient.norm()) for name, gradient in gradients.items() if name.startswith("1.")]
    assert len(own) == 3  # a bias, a magnitude and a direction
    assert report["1"].grad_norm == pytest.approx(math.hypot(*own), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, (inputs, targets) = mlp(30, weights=he), vectors()
    wide = signal_report(model, (inputs, targets), cross_entropy)
    half = signal_report(model.to(dtype), (inputs.to(dtype), targets), cross_entropy)
    assert half.verdict == "healthy"
    for one, other in zip(wide, half, strict=True):
        assert other.signal_std == pytest.approx(one.signal_std, rel=0.1)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=0.3)


def test_gradients_below_the_range_of_float16_are_seen() -> None:
    model, inputs = nn.Linear(8, 8), torch.randn(16, 8)
    loss = lambda model, inputs: (model(inputs).float() * 1e-8).sum()  # noqa: E731
    expected = signal_report(model, inputs, loss)[""].grad_norm
    row = signal_report(model.half(), inputs.half(), loss)[""]
    assert row.grad_norm == pytest.approx(expected, rel=0.01)
    assert row.output_grad_norm == pytest.approx(1e-8 * math.sqrt(128), rel=0.01)


def test_gradients_near_the_top_of_float16_are_seen() -> None:
    model, inputs = nn.Linear(8, 8), torch.randn(16, 8)
    loss = lambda model, inputs: (model(inputs).float() * 1e3).sum()  # noqa: E731
    expected = signal_report(model, inputs, loss)[""].grad_norm
    report = signal_report(model.half(), inputs.half(), loss)
    assert report.verdict == "healthy"
    assert report[""].grad_norm == pytest.approx(expected, rel=0.01)


def test_checkpointed_layers_are_counted_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.again = again
            self.body, self.head = mlp(3), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            body = checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)
            return self.head(body)

    model, batch = Checkpointed(again=False), vectors()
    plain = signal_report(model, batch, cross_entropy)
    model.again = True
    assert signal_report(model, batch, cross_entropy) == plain


def test_compiled_models_run_as_they_are_written() -> None:
    model, batch = mlp(3), vectors()
    compiled: Any = torch.compile(model, backend="eager")
    assert signal_report(compiled, batch, cross_entropy) == signal_report(model, batch, cross_entropy)


def test_lazy_modules_once_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"no lazy parameter without a shape, got '0\.weight': run a batch"):
        signal_report(model, torch.randn(8, 3))
    model(torch.randn(8, 3))
    assert len(signal_report(model, torch.randn(8, 3))) == 2


@pytest.mark.parametrize("batch", [torch.randn(1, 64), torch.randn(64)], ids=["one sample", "no batch"])
def test_one_sample(batch: Tensor) -> None:
    report = signal_report(mlp(5, weights=he), batch)
    assert report.verdict == "healthy"
    assert report["0"].signal_std > 0.1


# ---- faults and what only looks like one


def test_zero_initialised_branches_are_silent_by_design() -> None:
    model = zero_residual()
    report = signal_report(model, images(), cross_entropy)
    silent = [row.name for row in report if SILENT in row.flags]
    assert silent == [f"{block}.{layer}" for block in (1, 2) for layer in ("conv1", "norm1", "conv2", "norm2")]
    assert report["1.conv1"].grad_norm == 0
    assert report["1.norm2"].grad_norm > 0
    assert not report.findings
    assert not model[1].norm2.weight.any()


class Gated(nn.Module):
    """A branch behind two gates, both of which may be closed."""

    def __init__(self, inner: float, outer: float) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.inner, self.outer = nn.ParameterList([torch.full((8,), inner)]), nn.ParameterList([torch.tensor(outer)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.outer[0] * (self.inner[0] * self.branch(x)))


def test_a_branch_behind_one_closed_gate_is_silent_behind_two_dead() -> None:
    for inner, outer in ((0.0, 1.0), (1.0, 0.0)):
        report = signal_report(Gated(inner, outer), torch.randn(16, 8))
        assert report["branch"].flags == (SILENT,)
        assert report.verdict == "healthy"
    report = signal_report(Gated(0.0, 0.0), torch.randn(16, 8))  # neither gate gets a gradient
    assert {row.name for row in report if row.faults == ("dead",)} == {"branch", "inner", "outer"}
    frozen = Gated(0.0, 1.0)
    frozen.inner.requires_grad_(False)
    assert signal_report(frozen, torch.randn(16, 8))["branch"].flags == ("dead",)


def test_gates_that_open_one_after_the_other() -> None:
    model = zero_residual()
    nn.init.zeros_(model[-1].weight)  # and only then can the branches get a gradient
    report = signal_report(model, images(), cross_entropy)
    assert report.verdict == "healthy"
    assert all(SILENT in row.flags for row in report)
    assert not model[-1].weight.any()
    assert not model[1].norm2.weight.any()


def test_a_network_of_zeros_is_dead() -> None:
    assert signal_report(mlp(4, weights=nn.init.zeros_), vectors(), cross_entropy).verdict == "dead"


def test_rectifiers_that_let_nothing_pass() -> None:
    model = mlp(6, weights=he)
    nn.init.constant_(model[6].bias, -1e3)
    report = signal_report(model, vectors(), cross_entropy)
    assert report.verdict == "dead"
    assert report.findings[0].layers == ("0", "3", "6", "9", "12", "15")
    assert report.findings[0].evidence == {"gradient_or_signal": 0.0}
    assert "exactly 0" in str(report.findings[0])


def test_non_finite_layers_spoil_no_other_statistic() -> None:
    model = mlp(6, weights=he)
    healthy = signal_report(model, vectors(), cross_entropy)
    with torch.no_grad():
        model[6].weight[0, 0] = float("inf")
    report = signal_report(model, vectors(), cross_entropy)
    assert report.verdict.startswith("non-finite")
    assert report.findings[0].evidence["first_layer"] == report.findings[0].where == report.findings[0].layers[0]
    assert f": first in layer {report.findings[0].where}, loss nan. " in str(report.findings[0])
    assert report["3"].activation_std == pytest.approx(healthy["3"].activation_std, rel=0.5)
    assert not math.isfinite(report.loss)


def test_non_finite_values_alone_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = signal_report(model, torch.randn(8, 4), lambda model, inputs: (0 * model(inputs)).sqrt().sum())
    assert report.verdict == "non-finite"
    assert math.isfinite(report.loss)
    assert math.isfinite(report["0"].activation_std)


def test_inputs_that_are_not_standardised() -> None:
    inputs, targets = vectors()
    for scale in (1e-5, 1e6):
        batch = (scale * inputs, targets)
        assert signal_report(mlp(5, weights=he, norm=nn.BatchNorm1d), batch, cross_entropy).verdict == "healthy"
    assert signal_report(mlp(5, weights=he), (1e3 * inputs, targets), cross_entropy).verdict == "healthy"


def test_small_weights_in_front_of_a_norm() -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 50))
    nn.init.normal_(model[0].weight, std=0.005)
    report = signal_report(model, texts(), cross_entropy)
    assert report["0"].output_grad_norm > 30 * report["2"].output_grad_norm
    assert report.verdict == "healthy"


def test_small_branches_beside_a_healthy_stream() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(64, 64)
            self.branches = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for branch in self.branches:
                x = x + 1e-6 * branch(x).relu()
            return self.head(x)

    report = signal_report(Scaled(), vectors(), cross_entropy)
    assert report["branches.0"].output_grad_norm < 1e-5 * report["head"].output_grad_norm
    assert report.verdict == "healthy"


def test_thresholds() -> None:
    model, batch = mlp(8), vectors()
    assert signal_report(model, batch, cross_entropy).verdict == "healthy"
    assert signal_report(model, batch, cross_entropy, vanishing=0.1).verdict == VANISHING
    wild = mlp(6, weights=normal(0.3))
    assert signal_report(wild, batch, cross_entropy).verdict == "healthy"
    assert signal_report(wild, batch, cross_entropy, exploding=3).verdict == EXPLODING


# ---- nothing remains


class Eventful(nn.Module):
    """Draws random numbers, keeps statistics, counts, and changes its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.gate = nn.Parameter(torch.zeros(10))
        self.dropout = nn.Dropout()
        self.seen: list[float] = []
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.first(x))) + random.random() + float(np.random.rand())  # noqa: NPY002
        self.seen.append(float(x.detach().sum()))
        self.total += 1
        self.dropout.eval()
        return self.last(x) * self.gate


def test_nothing_remains_of_the_passes() -> None:
    model, batch = Eventful(), vectors()
    cross_entropy(model, batch).backward()
    model.train()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = copy.deepcopy((model.state_dict(), [each.clone() for each in gradients if each is not None]))
    seen, total = list(model.seen), model.total.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    report = signal_report(model, batch, cross_entropy)
    assert SILENT in report["first"].flags  # so the gate was moved, and is back
    assert_same_bits((model.state_dict(), [each for each in gradients if each is not None]), before)
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), gradients, strict=True))
    assert model.seen == seen
    assert torch.equal(model.total, total)
    assert model.dropout.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_remains_of_passes_that_fail() -> None:
    def fail(model: nn.Module, batch: Any) -> Tensor:
        cross_entropy(model, batch)
        raise RuntimeError("no loss today")

    model = Eventful()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no loss today"):
        signal_report(model, vectors(), fail)
    assert_same_bits(model.state_dict(), before)
    assert not model.seen
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_were_moved_are_back_after_a_failure() -> None:
    model = zero_residual()
    calls = []

    def fail_at_last(model: nn.Module, batch: Any) -> Tensor:
        calls.append(model[1].norm2.weight.any())  # type: ignore[index,union-attr]
        if calls[-1]:
            raise RuntimeError("too late")
        return cross_entropy(model, batch)

    with pytest.raises(RuntimeError, match="too late"):
        signal_report(model, images(), fail_at_last)
    assert len(calls) == 2
    assert not model[1].norm2.weight.any()


def test_the_same_report_twice() -> None:
    model, batch = Eventful(), vectors()
    assert_same_bits(signal_report(model, batch).rows, signal_report(model, batch).rows)


def test_gradients_are_on_even_where_they_are_off() -> None:
    with torch.no_grad():
        assert signal_report(mlp(3), vectors()).verdict == "healthy"


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear}, TypeError, "`model` must be a torch.nn.Module"),
        ({"loss_fn": 1.0}, TypeError, "`loss_fn` must be a function of model and batch, or None, got 1.0"),
        ({"vanishing": 1.0}, ValueError, "`vanishing` must be a number > 0 and < 1, got 1.0"),
        ({"exploding": 1}, ValueError, "`exploding` must be a number > 1, got 1"),
        ({"loss_fn": lambda model, batch: None}, TypeError, "`loss_fn` must return a scalar tensor.*got None"),
        ({"loss_fn": lambda model, batch: model(batch)}, ValueError, r"`loss_fn` must return.*of shape \(8, 3\)"),
        ({"loss_fn": lambda model, batch: batch.sum()}, ValueError, "a loss that depends on trainable parameters"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, ValueError, "a loss that depends on trainable parameters"),
        ({"model": nn.Linear(4, 3, device="meta")}, ValueError, "no parameters on the meta device"),
    ],
)
def test_wrong_use_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        signal_report(**{"model": nn.Linear(4, 3), "batch": torch.randn(8, 4), **arguments})


def test_a_model_without_floating_point_output_needs_a_loss_function() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(-1)

    with pytest.raises(ValueError, match="`loss_fn` must be given"):
        signal_report(Counting(), torch.randn(8, 4))


def test_sharded_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stability_callbacks.diagnosis._signal.DTensor", nn.Parameter)
    with pytest.raises(ValueError, match="`model` must not be sharded, got 'weight' as a DTensor"):
        signal_report(nn.Linear(4, 3), torch.randn(8, 4))


# ---- the report


@pytest.fixture
def report() -> SignalReport:
    return signal_report(mlp(20, weights=normal(0.3)), vectors(), cross_entropy)


def test_findings_say_what_where_and_what_helps(report: SignalReport) -> None:
    forward, backward = report.findings
    assert forward.kind == "exploding forward"
    assert forward.layers[-1] == "57"
    assert forward.evidence == {"activation_std": report["57"].activation_std, "layer": "57"}
    assert f"activation std {report['57'].activation_std:.2g} in layer 57" in str(forward)
    text = str(backward)
    assert text.startswith(f"exploding backward ({len(backward.layers)} layers, 0 to ")
    assert "in layer 0" in text
    assert "Remedy: add skip connections" in text


def test_findings_are_told_in_the_one_vocabulary(report: SignalReport) -> None:
    for finding in report.findings:
        assert isinstance(finding, Finding)
        assert (finding.where, finding.severity, finding.causes) == (finding.layers[0], "warning", ())
        assert KINDS[finding.kind].severity == finding.severity
        assert finding == SignalFinding(**vars(finding))
    assert KINDS["non-finite"].severity == KINDS["dead"].severity == "error"
    backward = report.findings[1].evidence
    assert backward["highest"] == max(row.output_grad_norm for row in report)
    assert backward["highest_layer"] == "0"


def test_the_report_is_still_found_where_it_was() -> None:
    for name, found in {
        "signal_report": signal_report,
        "SignalFinding": SignalFinding,
        "SignalReport": SignalReport,
        "SignalRow": SignalRow,
    }.items():
        assert getattr(initialization, name) is found
        assert name in initialization.__all__


def test_rows_are_found_by_name(report: SignalReport) -> None:
    assert len(report) == 20
    assert report["3"] is report.rows[1]
    assert next(iter(report)) is report.rows[0]
    with pytest.raises(KeyError, match="nowhere"):
        report["nowhere"]


def test_tables_show_each_layer(report: SignalReport) -> None:
    lines = str(report).splitlines()
    assert len(lines) == 22
    assert lines[0].split() == ["layer", "mean", "std", "signal", "dL/dy", "dL/dw", "dw/w", "flags"]
    assert lines[1].split()[0] == "0"
    assert lines[1].endswith("exploding backward")
    assert lines[-1] == "verdict: exploding forward, exploding backward"
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report, signal_report(nn.Linear(4, 3), torch.randn(8, 4)))
    shown = capture.get()
    assert "Signal at initialisation: exploding forward, exploding backward" in shown
    assert f"{report['57'].activation_std:.2g}" in shown
    assert "(model)" in shown


def test_report_survives_pickling(report: SignalReport) -> None:
    twin = pickle.loads(pickle.dumps(report))
    assert twin == report
    assert twin.verdict == report.verdict
