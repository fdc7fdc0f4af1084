"""The study of gradients at initialization: its measurements, its verdicts, and the command."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from recipes.gradient_flow import (
    ACTIVATIONS,
    ActivationName,
    Measurement,
    Observation,
    Setting,
    depth_sheets,
    digits_batches,
    draw_depths,
    draw_initializations,
    initialization_sheet,
    measure,
    network,
    observe,
    records,
    summarize,
    verdict,
    write_records,
)
from recipes.gradient_flow.__main__ import CONFIG, GradientFlow, main
from recipes.runner._command_line import from_command_line
from stability_callbacks.initialization import LSUV, Kaiming, Normal, Orthogonal, Policy, Xavier, signal_report

Array = NDArray[np.float64]


def gaussian_cdf(z: Array) -> Array:
    return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def by_hand(name: str, z: Array) -> tuple[Array, Array]:
    """An activation and its derivative."""
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(float)
    if name == "tanh":
        return np.tanh(z), 1 - np.tanh(z) ** 2
    if name == "sigmoid":
        y = 1 / (1 + np.exp(-z))
        return y, y * (1 - y)
    cdf = gaussian_cdf(z)
    return z * cdf, cdf + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def backpropagation(model: nn.Sequential, name: str, batch: Any) -> tuple[list[float], list[float]]:
    """The norms of the weights' gradients and the signals, without torch, in float64."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    biases = [layer.bias.detach().double().numpy() for layer in layers]
    inputs, labels = batch[0].double().numpy(), batch[1].numpy()

    hidden, slopes, signals = [inputs], [], []
    for weight, bias in zip(weights, biases, strict=True):
        z = hidden[-1] @ weight.T + bias
        signals.append(float(np.sqrt(z.var(axis=0).mean())))
        y, slope = by_hand(name, z)
        hidden.append(y)
        slopes.append(slope)
    odds = np.exp(z - z.max(axis=1, keepdims=True))
    delta = (odds / odds.sum(axis=1, keepdims=True) - np.eye(10)[labels]) / len(labels)

    norms = []
    for layer in reversed(range(len(weights))):
        norms.append(float(np.linalg.norm(delta.T @ hidden[layer])))
        delta = delta @ weights[layer] * (slopes[layer - 1] if layer else 1)
    return norms[::-1], signals


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_measurements_are_those_of_a_backpropagation_by_hand(
    activation: ActivationName, dtype: torch.dtype, tolerance: float
) -> None:
    model = network(64, 10, activation, depth=6, width=32).to(dtype)  # with PyTorch's biases
    _, batch = digits_batches(40, 0, dtype)
    measured = measure(model, batch)
    norms, signals = backpropagation(model, activation, batch)
    assert measured.gradient_norms == pytest.approx(norms, rel=tolerance, abs=0)
    assert measured.signal_stds == pytest.approx(signals, rel=tolerance, abs=0)


def test_an_orthogonal_linear_network_gives_all_layers_the_same_gradient() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(29)], nn.Linear(64, 10))
    Orthogonal(gain=1.0).apply(model)
    norms = measure(model, digits_batches(64, 0)[1]).gradient_norms
    assert len(norms) == 30
    assert norms == pytest.approx([norms[0]] * 30, rel=1e-5)


def test_he_keeps_the_second_moment_through_relu_in_expectation() -> None:
    (images, _), _ = digits_batches(64, 0)
    ratios = []
    for seed in range(150):
        torch.manual_seed(seed)
        model = network(64, 64, "relu", depth=5, width=64)
        Kaiming(nonlinearity="relu").apply(model)
        with torch.no_grad():
            ratios.append(float(torch.relu(model(images)).square().mean() / images.square().mean()))
    error = float(np.std(ratios)) / math.sqrt(len(ratios))
    assert abs(float(np.mean(ratios)) - 1) < 4 * error
    assert error < 0.08


def observation(activation: ActivationName, policy: Policy | None, depth: int, precision: int = 32) -> Observation:
    setting = Setting("depths", activation, "some", depth)
    dtype = torch.float32 if precision == 32 else torch.float64
    return observe(setting, policy, 0, width=64, batch_size=64, dtype=dtype)


def test_small_normal_weights_before_a_sigmoid_underflow_in_float32() -> None:
    single, double = (observation("sigmoid", Normal(std=0.01), 30, precision) for precision in (32, 64))
    assert single.measurement.first == 0
    assert 0 < double.measurement.first < 1e-45
    assert single.measurement.last == pytest.approx(double.measurement.last, rel=0.5)
    assert single.verdict == double.verdict == "vanishing"


def test_a_gradient_whose_square_underflows_is_not_zero() -> None:
    first = observation("sigmoid", None, 30).measurement.first
    assert 0 < first < 1e-23


def test_zero_over_zero_is_vanishing_and_null() -> None:
    lost = observation("relu", Normal(std=0.01), 60)
    assert lost.measurement.first == lost.measurement.last == 0
    assert math.isnan(lost.measurement.ratio)
    assert lost.verdict == "vanishing"
    (record,) = records([lost])
    assert record["ratio"] is None
    assert record["first"] == 0


def test_the_ratio_alone_would_miss_a_signal_that_dies_on_its_way_forward() -> None:
    lost = observation("relu", Xavier(gain=1.0), 100)
    assert 0.1 < lost.measurement.ratio < 10
    assert max(lost.measurement.gradient_norms) < 1e-12
    assert lost.verdict == "vanishing"


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1.0, 2.0, 1.0], "sound"),
        ([1e-4, 1e-2, 1e-1], "sound"),
        ([0.9e-4, 1e-2, 1e-2], "vanishing"),
        ([1e-3, 1.0, 1.1], "vanishing"),
        ([0.0, 0.0, 0.0], "vanishing"),
        ([29.0, 5.0, 1.0], "sound"),
        ([31.0, 5.0, 1.0], "exploding"),
        ([1.0, 101.0, 1.0], "exploding"),
        ([1.0, math.nan, 1.0], "exploding"),
        ([math.inf, math.inf, 1.0], "exploding"),
        ([1.0, 1.0, 0.0], "exploding"),
    ],
)
def test_the_verdict_goes_by_level_and_by_ratio(norms: list[float], expected: str) -> None:
    assert verdict(Measurement(tuple(norms), (1.0, 1.0, 1.0))) == expected


@pytest.fixture
def recipe(tmp_path: Path) -> GradientFlow:
    return from_command_line(GradientFlow, CONFIG, [f"--output={tmp_path}"])


def test_the_signal_report_of_the_package_is_of_the_same_opinion(recipe: GradientFlow) -> None:
    for setting in recipe.settings("initializations"):
        policy = recipe.policies["initializations"][setting.initialization]
        fit, held_out = digits_batches(64, 0)
        torch.manual_seed(0)
        model = network(64, 10, setting.activation, setting.depth, 64)
        if policy is not None:
            policy.apply(model, fit)
        report = signal_report(
            model, held_out, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        )
        seen = recipe.observe(setting, 0)
        assert seen.measurement.signal_stds == pytest.approx([row.signal_std for row in report], rel=1e-4, abs=1e-12)
        assert ("vanishing" in report.verdict, report.verdict == "healthy") == (
            seen.verdict == "vanishing",
            seen.verdict == "sound",
        ), setting


def test_the_grid_is_the_one_promised(recipe: GradientFlow) -> None:
    assert len(recipe.settings("initializations")) == 7 * 3
    depths = recipe.settings("depths")
    assert {setting.depth for setting in depths} == {5, 10, 20, 30, 50, 100}
    assert {setting.activation for setting in depths} == {"relu", "tanh", "sigmoid", "gelu"}
    assert list(recipe.seeds) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("default", math.sqrt(1 / (3 * 256))),
        ("normal", 0.01),
        ("lecun", math.sqrt(1 / 256)),
        ("xavier", math.sqrt(2 / (256 + 256))),
        ("he", math.sqrt(2 / 256)),
        ("orthogonal", math.sqrt(2 / 256)),
    ],
)
def test_each_initialization_is_the_one_it_is_called(recipe: GradientFlow, name: str, std: float) -> None:
    model = network(64, 10, "relu", depth=3, width=256)
    if policy := recipe.policies["initializations"][name]:
        policy.apply(model)
    weight = model[2].weight.detach()
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    kept = torch.allclose(weight @ weight.T, 2 * torch.eye(256), atol=1e-4)
    assert kept is (name == "orthogonal")


def test_a_network_depends_on_its_seed_alone_and_leaves_no_trace_in_random_numbers() -> None:
    first = observation("tanh", LSUV(), 5)
    state = torch.get_rng_state()
    torch.rand(3)
    again = observation("tanh", LSUV(), 5)
    assert first == again
    torch.set_rng_state(state)
    observation("tanh", None, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_two_batches_share_no_image_and_depend_on_the_seed() -> None:
    fit, held_out = digits_batches(898, 0)
    assert len(fit[0]) + len(held_out[0]) == 1796
    both = torch.cat([fit[0], held_out[0]])
    assert len(both.unique(dim=0)) == 1796
    assert abs(float(both.mean())) < 1e-2
    assert abs(float(both.std()) - 1) < 1e-2
    assert not torch.equal(digits_batches(8, 1)[0][0], digits_batches(8, 0)[0][0])


@dataclass
class Finished:
    output: Path
    printed: str
    records: list[dict[str, Any]]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


TINY = ["--seed=3", "--seeds=2", "--layers=4", "--depths=[2,30,5]", "--width=8", "--batch_size=16"]


def run(output: Path, *options: str) -> Finished:
    stream = io.StringIO()
    with patch("recipes.gradient_flow.__main__.Console", lambda: Console(file=stream, width=80)):
        assert main([*TINY, f"--output={output}", *options]) == 0
    content = json.loads((output / "results.json").read_text(), parse_constant=refuse)
    return Finished(output, stream.getvalue(), content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tmp_path_factory.mktemp("gradient_flow"))


def test_there_is_a_record_of_every_network_in_strict_json(finished: Finished) -> None:
    assert len(finished.records) == 2 * (7 * 3 + 4 * 4 * 3)
    for record in finished.records:
        assert record["study"] in ("initializations", "depths")
        assert record["seed"] in (3, 4)
        assert len(record["gradient_norms"]) == len(record["signal_stds"]) == record["depth"]
        assert record["gradient_norms"][0] == record["first"]
        assert record["gradient_norms"][-1] == record["last"]
        assert record["verdict"] in ("vanishing", "exploding", "sound")
        if record["last"]:
            assert record["ratio"] == record["first"] / record["last"]


def test_the_tables_fit_the_screen_and_are_in_the_summary(finished: Finished) -> None:
    screen, _, _ = finished.printed.partition("Summary  ")  # which shows the output's path, however long
    assert max(map(len, screen.splitlines())) <= 80
    summary = (finished.output / "summary.md").read_text()
    assert summary.count("| activation | init |") == 3
    assert "| relu | orthogonal |" in summary
    assert "↓" in summary
    assert "vanishing below 0.001" in summary
    for figure in ("initializations", "depths"):
        assert f"![{figure}]({figure}.png)" in summary
        assert imread(finished.output / f"{figure}.png").shape[0] > 300


def test_the_tables_of_the_defaults_fit_whatever_the_numbers(recipe: GradientFlow) -> None:
    widest = Measurement((1.2e-44, 1.2e-12, 1.2e-12, 1.2e300), (1.2e-44,) * 4)
    for study in recipe.studies:
        summaries = summarize(Observation(setting, 0, widest) for setting in recipe.settings(study))
        sheets = [initialization_sheet(summaries)] if study == "initializations" else depth_sheets(summaries)
        for sheet in sheets:
            console = Console(file=io.StringIO(), width=200)
            assert console.measure(sheet.table()).maximum <= 80


def test_the_numbers_in_the_tables_are_medians_over_the_seeds(finished: Finished) -> None:
    firsts = sorted(
        record["first"]
        for record in finished.records
        if (record["study"], record["activation"], record["initialization"]) == ("initializations", "tanh", "he")
    )
    (row,) = re.findall(r"^\| tanh \| he \| (.*)$", (finished.output / "summary.md").read_text(), re.MULTILINE)
    assert row.split(" | ")[0] == f"{firsts[0]:.2g}"  # of two, the lower


def test_tensorboard_has_a_run_of_each_setting_with_the_layers_as_steps(finished: Finished) -> None:
    path = finished.output / "tensorboard"
    he = EventAccumulator(str(path / "initializations" / "relu" / "he")).Reload()
    assert [event.step for event in he.Scalars("gradient_norm")] == [1, 2, 3, 4]
    assert [event.step for event in he.Scalars("signal_std")] == [1, 2, 3, 4]
    auto = EventAccumulator(str(path / "depths" / "gelu" / "auto")).Reload()
    assert len(auto.Scalars("gradient_norm/depth_30")) == 30
    assert [event.step for event in auto.Scalars("by_depth/first_gradient_norm")] == [2, 5, 30]
    figures = EventAccumulator(str(path / "figures")).Reload()
    assert figures.Tags()["images"] == ["initializations", "depths"]


def test_one_study_alone_replaces_what_an_earlier_run_left(tmp_path: Path) -> None:
    options = ("--study=initializations", "--seeds=1", '--initializations={"mine": null}')
    run(tmp_path, *options)
    again = run(tmp_path, *options)
    assert [record["initialization"] for record in again.records] == ["mine"] * 3
    assert not (tmp_path / "depths.png").exists()
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 3 + 1


def test_a_network_has_the_same_numbers_whatever_is_measured_with_it(finished: Finished, tmp_path: Path) -> None:
    alone = run(tmp_path, "--study=depths", "--depths=[5]", "--seed=4", "--seeds=1").records
    assert len(alone) == 16
    assert alone == [
        record for record in finished.records if (record["study"], record["depth"], record["seed"]) == ("depths", 5, 4)
    ]


def test_an_interruption_leaves_what_was_measured(tmp_path: Path) -> None:
    count = 0

    def interrupted(self: GradientFlow, setting: Setting, seed: int) -> Observation:
        nonlocal count
        count += 1
        if count == 6:  # in the middle of a setting of two seeds
            raise KeyboardInterrupt
        return observe(setting, None, seed, width=8, batch_size=8, dtype=torch.float32)

    with patch.object(GradientFlow, "observe", interrupted):
        assert main([*TINY, f"--output={tmp_path}"]) == 130
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    assert "| relu | normal |" in (tmp_path / "summary.md").read_text()
    assert "| relu | lecun |" not in (tmp_path / "summary.md").read_text()


def test_numbers_that_no_logarithm_shows_are_drawn_and_recorded(tmp_path: Path) -> None:
    odd = [(math.inf, math.nan, 1.0), (0.0, 0.0, 0.0), (1e-300, 1e-3, 1.0)]
    observations = [
        Observation(Setting("depths", "relu", name, 3), 0, Measurement(norms, norms))
        for name, norms in zip(("a", "b", "c"), odd, strict=True)
    ]
    write_records(observations, tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert content[0]["gradient_norms"] == [None, None, 1.0]
    summaries = summarize(observations)
    for draw in (draw_depths, draw_initializations):
        draw(summaries, tmp_path / "figure.png")
    _, ratios = depth_sheets(summaries)
    assert [row[-1].text for row in ratios.rows] == ["inf↑", "0/0↓", "1e-300↓"]
    assert "| relu | b | 0/0↓ |" in ratios.markdown()
    assert ratios.table().row_count == 3


def test_each_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    options = re.split(r"\n  (?=-)", text)[1:]
    assert len(options) == 3 + 12
    for option in options:
        text = re.sub(r"\(default: .*\)", "", " ".join(option.split()))
        words = [word for word in text.split() if not re.match(r"[-\[{]|[A-Z_]+$|None$", word)]
        assert len(words) >= 3, option


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch_size=899", "`batch_size` must be from 2 to 898"),
        ("--batch_size=1", "`batch_size` must be from 2 to 898"),
        ("--seeds=0", "seeds"),
        ("--depths=[0]", "depths"),
        ("--depths=[]", "something to compare"),
        ("--initializations={}", "something to compare"),
        ("--study=both", "study"),
        ("--precision=16", "precision"),
    ],
)
def test_wrong_use_is_told_in_one_line(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([option])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
