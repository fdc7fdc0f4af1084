"""Spike: against a plain float64 reference, on sound runs that must not set it off, and on spikes that must."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from stability_callbacks.detection import Detector, Spike
from stability_callbacks.gradient_pass import measure_gradients
from tests.detection.evidence import evidence

NAN, INF = math.nan, math.inf
BAD = (NAN, INF, -INF)
Steps = Iterable[tuple[float | None, float]]
Series = NDArray[np.float64]


def verdict(accepted: bool) -> Tensor:
    return torch.tensor(accepted)


def teach(spike: Spike, steps: Steps) -> Spike:
    """Let it learn losses and norms as those of accepted steps."""
    for loss, norm in steps:
        spike.update(evidence(loss, norm), verdict(True))
    return spike


def votes(spike: Spike, steps: Steps) -> list[bool]:
    """What it votes in a run that skips what it votes against."""
    voted = []
    for loss, norm in steps:
        step = evidence(loss, norm)
        vote = spike(step)
        assert vote.shape == ()
        assert vote.dtype == torch.bool
        spike.update(step, ~vote)
        voted.append(bool(vote))
    return voted


def scores(spike: Spike, loss: float | None, norm: float = 1.0) -> list[float]:
    return spike.z_scores(evidence(loss, norm)).tolist()


def assert_same_state(spike: Spike, state: dict[str, Tensor]) -> None:
    now = spike.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=0, equal_nan=True)


# The reference


def reference_score(accepted: Sequence[float], value: float | None, floor: float, min_history: int) -> float:
    """The z-score as the class defines it, in plain numpy."""
    if value is None or not math.isfinite(value) or len(accepted) < min_history:
        return NAN
    past = np.asarray(accepted, dtype=np.float64)
    with np.errstate(all="ignore"):
        if past.min() >= 0:
            past, current, unit = np.log(past), np.log(np.float64(value)), 1.0
        else:
            current, unit = np.float64(value), abs(float(np.median(past)))
        median = np.median(past)
        scale = max(1.4826 * float(np.median(np.abs(past - median))), floor * unit)
        return float((current - median) / scale) if scale > 0 else NAN


numbers = st.floats(2.0**-10, 2.0**10, width=32)
losses = st.one_of(st.none(), numbers, numbers, numbers, st.sampled_from((*BAD, 0.0, 1.0, 1e6)))
signed_losses = st.one_of(losses, numbers.map(lambda value: -value))
norms = st.one_of(numbers, numbers, numbers, st.sampled_from((NAN, INF, 0.0, 1.0, 1e6)))


def runs(of: st.SearchStrategy[float | None]) -> st.SearchStrategy[list[tuple[float | None, float, bool]]]:
    return st.lists(st.tuples(of, norms, st.sampled_from((True, True, False))), min_size=1, max_size=40)


@given(
    st.one_of(runs(losses), runs(signed_losses)),
    st.integers(2, 12),
    st.integers(2, 12),
    st.sampled_from(("loss", "grad_norm", "both")),
)
def test_equals_the_reference(run: list[tuple[float | None, float, bool]], window: int, least: int, on: str) -> None:
    least = min(least, window)
    spike = Spike(window, threshold=3.0, min_history=least, on=on)
    past: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for loss, norm, accepted in run:
        step = evidence(loss, norm)
        expected = {
            "loss": reference_score(past["loss"][-window:], loss, 0.02, least),
            "grad_norm": reference_score(past["grad_norm"][-window:], norm or NAN, 0.2, least),
        }
        watched = [z for name, z in expected.items() if on in (name, "both")]
        np.testing.assert_allclose(spike.z_scores(step).tolist(), watched, rtol=1e-9, atol=1e-12, equal_nan=True)
        if all(abs(z - 3.0) > 1e-6 for z in watched):
            assert bool(spike(step)) == any(z > 3.0 for z in watched)
        spike.update(step, verdict(accepted))
        if accepted and loss is not None and math.isfinite(loss):
            past["loss"].append(loss)
        if accepted and math.isfinite(norm) and norm > 0:
            past["grad_norm"].append(norm)


def test_a_score_worked_out_by_hand() -> None:
    spike = Spike(window=8, min_history=4)
    teach(spike, [(math.exp(y), math.exp(10 * y)) for y in (0.1, 0.2, 0.3, 0.5)])
    # Logarithms of the loss: median 0.25, deviations 0.15, 0.05, 0.05, 0.25 with median 0.1.
    loss, norm = scores(spike, math.exp(1.25), math.exp(12.5))
    assert loss == pytest.approx(1.0 / 0.14826)
    assert norm == pytest.approx(10.0 / 1.4826)


def test_a_loss_that_may_be_negative_is_compared_as_it_is() -> None:
    spike = teach(Spike(window=8, min_history=4, on="loss"), [(loss, 1.0) for loss in (-3.0, -2.0, -1.0, 1.0)])
    assert scores(spike, 8.5) == [pytest.approx(10.0 / 1.4826)]  # median -1.5, deviations 1.5, 0.5, 0.5, 2.5
    teach(spike, [(1.0, 1.0)] * 6)  # one negative loss is left
    assert scores(spike, 2.0) == [pytest.approx(1.0 / 0.02)]
    teach(spike, [(1.0, 1.0)])
    assert scores(spike, 2.0) == [pytest.approx(math.log(2.0) / 0.02)]


# Sound runs


def decaying_loss(generator: np.random.Generator, steps: int) -> Series:
    return (2.0 * np.exp(-np.arange(steps) / 200) + 0.5) * generator.lognormal(sigma=0.05, size=steps)


def loss_near_zero(generator: np.random.Generator, steps: int) -> Series:
    """As of a classifier that has learned its data, at a small batch size."""
    return generator.lognormal(mean=-5, sigma=1.5, size=steps)


def language_model_loss(generator: np.random.Generator, steps: int) -> Series:
    return 2.0 + 8.0 * (1 + np.arange(steps) / 20) ** -0.5 + generator.normal(scale=0.03, size=steps)


def loss_with_rate_drops(generator: np.random.Generator, steps: int) -> Series:
    return 0.4 ** (np.arange(steps) // 200) * generator.lognormal(sigma=0.1, size=steps)


def likelihood_below_zero(generator: np.random.Generator, steps: int) -> Series:
    return 3.0 - 5.0 * (1 - np.exp(-np.arange(steps) / 200)) + generator.normal(scale=0.2, size=steps)


def nearly_constant_loss(generator: np.random.Generator, steps: int) -> Series:
    bumps = 0.1 * (generator.random(steps) < 0.02)
    return 0.7 * (1 + bumps + generator.normal(scale=1e-6, size=steps))


LOSSES = [
    decaying_loss,
    loss_near_zero,
    language_model_loss,
    loss_with_rate_drops,
    likelihood_below_zero,
    nearly_constant_loss,
]


@pytest.mark.parametrize("simulate", LOSSES)
def test_the_loss_of_a_sound_run_never_fires(simulate: object) -> None:
    assert callable(simulate)
    losses = simulate(np.random.default_rng(0), 600)
    assert not any(votes(Spike(on="loss"), [(loss, 1.0) for loss in losses.tolist()]))


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("drift", [-1.5, 1.5])
def test_the_norms_of_a_sound_run_never_fire(sigma: float, drift: float) -> None:
    """Log-normal norms, with a bump now and then, that fall or rise fourfold over the run."""
    drifting = np.exp(drift * np.arange(400) / 400)
    norms = drifting * np.random.default_rng(1).lognormal(sigma=sigma, size=400)
    norms[::97] = 2.5 * drifting[::97]
    assert not any(votes(Spike(on="grad_norm"), [(1.0, norm) for norm in norms.tolist()]))


def test_the_plain_score_of_a_loss_near_zero_would_fire() -> None:
    """Or the simulation would be no test of the logarithm."""
    losses = loss_near_zero(np.random.default_rng(0), 600)
    median = np.median(losses)
    z = (losses - median) / (1.4826 * np.median(np.abs(losses - median)))
    assert (z > 6).mean() > 0.05


def small_batch_run(corrupt: int | None = None) -> list[tuple[float, float]]:
    """Losses and norms of a small network on a problem it learns well; if wanted, with wrong labels at one step."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    labels = (inputs @ torch.randn(16, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = []
    for step in range(400):
        rows = torch.randint(512, (16,))
        target = labels[rows] if step != corrupt else (labels[rows] + 1) % 4
        loss = nn.functional.cross_entropy(model(inputs[rows]), target)
        optimizer.zero_grad()
        loss.backward()
        steps.append((loss.item(), float(measure_gradients(model.parameters()).total)))
        optimizer.step()
    return steps


def test_a_real_run_never_fires_and_a_wrong_batch_in_it_does() -> None:
    assert not any(votes(Spike(), small_batch_run()))
    corrupted = small_batch_run(corrupt=300)
    assert [step for step, vote in enumerate(votes(Spike(), corrupted[:301])) if vote] == [300]


# Spikes


@pytest.mark.parametrize("simulate", [decaying_loss, language_model_loss, likelihood_below_zero, nearly_constant_loss])
def test_a_loss_spike_is_found_and_does_not_hide_the_next(simulate: object) -> None:
    assert callable(simulate)
    losses = simulate(np.random.default_rng(2), 500)
    losses[[400, 401, 402, 480]] += 3.0
    found = votes(Spike(on="loss"), [(loss, 1.0) for loss in losses.tolist()])
    assert [step for step, vote in enumerate(found) if vote] == [400, 401, 402, 480]


def test_a_norm_spike_is_found() -> None:
    norms = np.random.default_rng(3).lognormal(sigma=0.3, size=300)
    norms[[150, 250]] *= 50
    found = votes(Spike(on="grad_norm"), [(1.0, norm) for norm in norms.tolist()])
    assert [step for step, vote in enumerate(found) if vote] == [150, 250]


@pytest.mark.parametrize(
    ("on", "loss", "norm", "expected"),
    [
        ("both", 5.0, 1.0, True),
        ("both", 1.0, 20.0, True),
        ("both", 1.0, 1.0, False),
        ("loss", 5.0, 1.0, True),
        ("loss", 1.0, 20.0, False),
        ("grad_norm", 5.0, 1.0, False),
        ("grad_norm", 1.0, 20.0, True),
    ],
)
def test_only_watched_series_vote(on: str, loss: float, norm: float, expected: bool) -> None:
    spike = teach(Spike(on=on), [(1.0, 1.0)] * 64)
    assert bool(spike(evidence(loss, norm))) == expected


@pytest.mark.parametrize("low", [1e-6, 0.0, -50.0])
def test_what_falls_never_votes(low: float) -> None:
    spike = teach(Spike(), [(1.0, 1.0)] * 64)
    assert not bool(spike(evidence(low, max(low, 1e-12))))


@pytest.mark.parametrize("level", [1e-12, 1.0, 1e12])
def test_a_constant_window_fires_beyond_its_floor_only(level: float) -> None:
    spike = teach(Spike(), [(level, level)] * 128)
    for loss, norm, expected in [(1.12, 3.3, False), (1.13, 1.0, True), (1.0, 3.4, True)]:
        assert bool(spike(evidence(level * loss, level * norm))) == expected


def test_a_constant_negative_window_fires_beyond_its_floor_only() -> None:
    spike = teach(Spike(on="loss"), [(-10.0, 1.0)] * 128)
    assert not bool(spike(evidence(-8.9)))
    assert bool(spike(evidence(-8.7)))


@pytest.mark.parametrize("others", [[0.3] * 31, [-0.3] * 31])
def test_a_loss_that_is_mostly_zero_has_no_score(others: list[float]) -> None:
    """A hinge loss at its end: without a spread there is nothing to measure by."""
    spike = teach(Spike(on="loss", window=64), [(loss, 1.0) for loss in [0.0] * 33 + others])
    assert math.isnan(scores(spike, 5.0)[0])
    assert not bool(spike(evidence(5.0)))


def test_a_level_shift_upwards_is_refused_for_good_and_one_downwards_followed() -> None:
    spike = teach(Spike(on="loss"), [(1.0, 1.0)] * 128)
    assert all(votes(spike, [(3.0, 1.0)] * 200))
    assert not any(votes(spike, [(0.1, 1.0)] * 128))
    assert bool(spike(evidence(1.0)))


def test_a_slow_rise_is_followed() -> None:
    losses = np.exp(np.linspace(0, 2, 500)) * np.random.default_rng(4).lognormal(sigma=0.02, size=500)
    assert not any(votes(Spike(on="loss"), [(loss, 1.0) for loss in losses.tolist()]))


# What enters the window


@pytest.mark.parametrize("bad", BAD)
def test_bad_values_neither_vote_nor_enter(bad: float) -> None:
    spike = teach(Spike(window=8, min_history=4), [(1.0, 1.0), (1.1, 2.0), (0.9, 1.5), (1.0, 1.0), (1.2, 1.1)])
    state = spike.state_dict()
    for step in (evidence(bad, bad), evidence(None, 0.0), evidence(bad, 0.0)):
        assert not bool(spike(step))
        spike.update(step, verdict(True))
    assert_same_state(spike, state)


def test_one_bad_series_does_not_keep_the_other_out() -> None:
    spike = teach(Spike(window=4, min_history=2), [(1.0, 1.0)] * 4)
    teach(spike, [(NAN, 2.0), (3.0, 0.0), (None, 2.0)])
    state = spike.state_dict()
    assert sorted(state["history"][0].tolist()) == [1.0, 1.0, 1.0, 3.0]
    assert sorted(state["history"][1].tolist()) == [1.0, 1.0, 2.0, 2.0]


def test_skipped_steps_never_enter() -> None:
    spike = teach(Spike(window=8, min_history=4), [(1.0, 1.0)] * 5)
    state = spike.state_dict()
    for loss in (1.0, 5.0, 0.5):
        spike.update(evidence(loss, loss), verdict(False))
    assert_same_state(spike, state)


def test_each_series_is_silent_until_it_has_enough_values() -> None:
    spike = teach(Spike(min_history=4), [(None, 1.0)] * 3)
    assert not bool(spike(evidence(1e6, 1e6)))
    teach(spike, [(1.0, 1.0)])
    assert [math.isnan(z) for z in scores(spike, 1e6, 1e6)] == [True, False]
    teach(spike, [(1.0, NAN)] * 3)
    assert not any(math.isnan(z) for z in scores(spike, 1e6, 1e6))
    assert not bool(spike(evidence(None, 1.0)))


def test_memory_is_made_once() -> None:
    spike = teach(Spike(window=4, min_history=2), [(1.0, 1.0)])
    before = [tensor.data_ptr() for tensor in spike._memory(torch.device("cpu"))]
    teach(spike, [(1.0, 1.0)] * 20)
    assert [tensor.data_ptr() for tensor in spike._memory(torch.device("cpu"))] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_evidence_makes_double_statistics(dtype: torch.dtype) -> None:
    spike = Spike(window=8, min_history=4)
    for loss in (1.0, 1.1, 0.9, 1.0, 1.05):
        spike.update(evidence(loss, loss, dtype=dtype), verdict(True))
    history = spike.state_dict()["history"]
    assert history.dtype == torch.float64
    assert history[0, 1].item() == torch.tensor(1.1, dtype=dtype).item()
    assert bool(spike(evidence(6e4, 1.0, dtype=dtype)))


def test_a_loss_that_still_has_its_graph_is_let_go_of() -> None:
    weight = nn.Parameter(torch.tensor(1.0))
    step = evidence()._replace(loss=weight * 2)
    spike = Spike(window=4, min_history=2)
    spike.update(step, verdict(True))
    assert not spike.z_scores(step).requires_grad
    assert not spike.state_dict()["history"].requires_grad


# State and settings


@pytest.mark.parametrize("on", ["loss", "grad_norm", "both"])
def test_state_resumes_bit_for_bit(on: str) -> None:
    generator = np.random.default_rng(5)
    steps = list(zip(generator.lognormal(size=90).tolist(), generator.lognormal(size=90).tolist(), strict=True))
    whole, first, second = (Spike(window=16, min_history=8, threshold=1.5, on=on) for _ in range(3))
    expected = votes(whole, steps)
    assert 5 < sum(expected) < 50
    votes(first, steps[:37])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    votes(second, steps[:5])  # what it knew is forgotten
    second.load_state_dict(torch.load(file, weights_only=True))
    assert votes(second, steps[37:]) == expected[37:]
    assert_same_state(second, whole.state_dict())


@pytest.mark.parametrize("other", [Spike(window=64), Spike(on="loss")], ids=repr)
def test_a_state_of_other_settings_is_refused(other: Spike) -> None:
    state = teach(Spike(), [(1.0, 1.0)]).state_dict()
    with pytest.raises(ValueError, match=r"history of shape \(2, 128\).*`window` and `on`"):
        other.load_state_dict(state)


def test_is_a_detector_that_shows_its_settings() -> None:
    spike = teach(Spike(), [(1.0, 1.0)])
    assert isinstance(spike, Detector)
    assert (spike.kind, spike.needs_inputs) == ("spike", False)
    assert repr(spike) == "Spike(window=128, threshold=6.0, min_history=64, on='both')"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window": 1}, ValueError, "`window` must be an integer >= 2, got 1"),
        ({"window": 12.5}, TypeError, "`window`"),
        ({"threshold": 0}, ValueError, "`threshold` must be a number > 0, got 0"),
        ({"threshold": NAN}, ValueError, "`threshold`"),
        ({"min_history": 1}, ValueError, "`min_history`"),
        ({"window": 32}, ValueError, "`min_history` must be an integer >= 2 and <= 32, got 64"),
        ({"on": "norm"}, ValueError, "`on` must be one of 'loss', 'grad_norm', 'both', got 'norm'"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Spike(**settings)  # type: ignore[arg-type]
