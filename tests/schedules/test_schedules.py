"""Every schedule against formulas written out here, torch's own schedulers, and the convention as properties."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from stability_callbacks.schedules import (
    Scaled,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.contracts import schedules as laws

ALL = (WarmupCosine, WarmupLinear, WarmupStableDecay, WarmupInverseSqrt, WarmupConstant)
DECAYING = (WarmupCosine, WarmupLinear, WarmupStableDecay)
OPEN_ENDED = (WarmupInverseSqrt, WarmupConstant)

# Small enough that a run over all steps is quick, with shares and integers, and both kinds of "no warm-up".
lengths = st.integers(1, 60)
multipliers = st.floats(0, 1)


@st.composite
def spans(draw: st.DrawFn, total: int) -> int | float:
    return draw(st.one_of(st.integers(0, total), st.floats(0, 1)))


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[type[Schedule], ...] = ALL) -> tuple[Schedule, int]:
    """A schedule of any kind and a total that it fits in."""
    total = draw(lengths)
    kind = draw(st.sampled_from(kinds))
    arguments = {"warmup": draw(spans(total)), "start": draw(multipliers)}
    if kind in DECAYING:
        arguments["end"] = draw(multipliers)
    if kind is WarmupCosine:
        arguments["cycles"] = draw(st.integers(1, 5))
    if kind is WarmupStableDecay:
        warmup = arguments["warmup"]
        left = 1.0 - warmup if isinstance(warmup, float) else total - warmup
        arguments["decay"] = draw(st.floats(0, left) if isinstance(left, float) else st.integers(0, left))
        arguments["shape"] = draw(st.sampled_from(["linear", "cosine", "1-sqrt"]))
    if kind is WarmupInverseSqrt:
        arguments["timescale"] = draw(st.one_of(st.none(), st.integers(1, 1000)))
    return kind(**arguments), total


def curve(schedule: Schedule, total: int, beyond: int = 5) -> list[float]:
    return [schedule(step, total) for step in range(total + beyond)]


def differences(values: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(values)]


class TestFormulas:
    """The published formulas in float64 numpy, over whole runs."""

    total, warmup, start, end = 97, 13, 0.1, 0.05
    steps = np.arange(120)

    def ramp(self, after: np.ndarray) -> np.ndarray:
        ramp = self.start + (1 - self.start) * self.steps / self.warmup
        return np.where(self.steps < self.warmup, ramp, after)

    def check(self, schedule: Schedule, expected: np.ndarray) -> None:
        actual = [schedule(int(step), self.total) for step in self.steps]
        np.testing.assert_allclose(actual, expected, rtol=1e-14, atol=1e-15)

    def progress(self) -> np.ndarray:
        return np.clip((self.steps - self.warmup) / (self.total - self.warmup), 0, 1)

    def test_cosine(self) -> None:
        after = self.end + (1 - self.end) * 0.5 * (1 + np.cos(np.pi * self.progress()))
        self.check(WarmupCosine(self.warmup, start=self.start, end=self.end), self.ramp(after))

    def test_cosine_with_restarts(self) -> None:
        # The 84 steps after the warm-up make three cycles of 28.
        within = np.where(self.steps < self.total, (self.steps - self.warmup) % 28 / 28, 1.0)
        after = self.end + (1 - self.end) * 0.5 * (1 + np.cos(np.pi * within))
        self.check(WarmupCosine(self.warmup, start=self.start, end=self.end, cycles=3), self.ramp(after))

    def test_linear(self) -> None:
        after = 1 - (1 - self.end) * self.progress()
        self.check(WarmupLinear(self.warmup, start=self.start, end=self.end), self.ramp(after))

    @pytest.mark.parametrize(
        ("shape", "curve"),
        [
            ("linear", lambda p: 1 - p),
            ("cosine", lambda p: (1 + np.cos(np.pi * p)) / 2),
            ("1-sqrt", lambda p: 1 - np.sqrt(p)),
        ],
    )
    def test_stable_decay(self, shape: str, curve: Callable[[np.ndarray], np.ndarray]) -> None:
        decay = 20
        progress = np.clip((self.steps - (self.total - decay)) / decay, 0, 1)
        after = self.end + (1 - self.end) * curve(progress)
        schedule = WarmupStableDecay(self.warmup, decay=decay, shape=shape, start=self.start, end=self.end)
        self.check(schedule, self.ramp(after))

    def test_inverse_sqrt(self) -> None:
        after = np.sqrt(self.warmup / np.maximum(self.steps, 1))
        self.check(WarmupInverseSqrt(self.warmup, start=self.start), self.ramp(after))

    def test_inverse_sqrt_with_a_time_scale(self) -> None:
        after = 1 / np.sqrt(np.maximum(self.steps - self.warmup + 500, 1) / 500)
        self.check(WarmupInverseSqrt(self.warmup, start=self.start, timescale=500), self.ramp(after))

    def test_inverse_sqrt_without_warmup(self) -> None:
        self.check(WarmupInverseSqrt(warmup=0), 1 / np.sqrt(1 + self.steps))

    def test_constant(self) -> None:
        self.check(WarmupConstant(self.warmup, start=self.start), self.ramp(np.ones(120)))

    def test_inverse_sqrt_is_the_first_transformers(self) -> None:
        """Vaswani et al., equation 3, over its own peak: min(t^-0.5, t w^-1.5) / w^-0.5."""
        schedule = WarmupInverseSqrt(warmup=4000)
        for step in (1, 10, 3999, 4000, 4001, 100_000):
            published = min(step**-0.5, step * 4000**-1.5) * 4000**0.5
            assert schedule(step) == pytest.approx(published, rel=1e-14)


class TestOtherLibraries:
    """The same numbers as torch's schedulers and the cosine-with-warm-up of Hugging Face."""

    @staticmethod
    def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make(optimizer)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    @staticmethod
    def after_warmup(second: Callable[[torch.optim.Optimizer], LRScheduler]) -> Callable[..., LRScheduler]:
        def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
            warmup = LinearLR(optimizer, start_factor=0.2, total_iters=10)
            return SequentialLR(optimizer, [warmup, second(optimizer)], milestones=[10])

        return make

    @pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's own call
    def test_torch_cosine(self) -> None:
        make = self.after_warmup(lambda optimizer: CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1))
        ours = curve(WarmupCosine(10, start=0.2, end=0.1), total=60, beyond=1)
        assert ours == pytest.approx(self.rates(make, 61), rel=1e-12)

    @pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
    def test_torch_linear(self) -> None:
        make = self.after_warmup(lambda optimizer: LinearLR(optimizer, 1.0, end_factor=0.1, total_iters=50))
        ours = curve(WarmupLinear(10, start=0.2, end=0.1), total=60)
        assert ours == pytest.approx(self.rates(make, 65), rel=1e-12)

    @pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
    def test_torch_constant(self) -> None:
        make = self.after_warmup(lambda optimizer: ConstantLR(optimizer, 1.0, total_iters=1))
        ours = curve(WarmupConstant(10, start=0.2), total=60)
        assert ours == pytest.approx(self.rates(make, 65), rel=1e-12)

    @pytest.mark.parametrize("cycles", [1, 4])
    def test_hugging_face_cosine(self, cycles: int) -> None:
        """`get_cosine_with_hard_restarts_schedule_with_warmup`; one cycle is `get_cosine_schedule_with_warmup`."""
        warmup, total = 16, 144  # powers of two apart, so that its floating remainder is exact

        def published(step: int) -> float:
            if step < warmup:
                return step / max(1, warmup)
            progress = (step - warmup) / max(1, total - warmup)
            if progress >= 1.0:
                return 0.0
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))

        ours = WarmupCosine(warmup, cycles=cycles)
        for step in range(total + 10):
            assert ours(step, total) == pytest.approx(published(step), abs=1e-15)


class TestConvention:
    """The convention that all schedules share, over random arguments."""

    @given(schedules())
    def test_within_bounds(self, case: tuple[Schedule, int]) -> None:
        schedule, total = case
        for value in curve(schedule, total):
            assert type(value) is float
            assert 0.0 <= value <= 1.0

    @given(schedules())
    def test_starts_at_start_and_peaks_at_the_end_of_warmup(self, case: tuple[Schedule, int]) -> None:
        schedule, total = case
        warmup = schedule.warmup_steps(total)
        assert 0 <= warmup <= total
        if warmup > 0:
            assert schedule(0, total) == schedule.start
        if warmup < total:
            assert schedule(warmup, total) == 1.0

    @given(schedules())
    def test_warmup_is_a_straight_rise(self, case: tuple[Schedule, int]) -> None:
        schedule, total = case
        warmup = schedule.warmup_steps(total)
        rises = differences(curve(schedule, total)[: warmup + 1 if warmup < total else warmup])
        assert rises == pytest.approx([(1 - schedule.start) / max(warmup, 1)] * len(rises), abs=1e-12)

    @settings(max_examples=20)
    @given(total=st.integers(100, 300), warmup=st.floats(0.1, 0.5), end=multipliers)
    def test_no_jump_anywhere(self, total: int, warmup: float, end: float) -> None:
        """Without restarts no step moves the multiplier further than the steepest slope of the curve allows."""
        for schedule in (
            WarmupCosine(warmup, end=end),
            WarmupLinear(warmup, end=end),
            WarmupStableDecay(warmup, end=end, decay=0.2, shape="linear"),
            WarmupStableDecay(warmup, end=end, decay=0.2, shape="cosine"),
            WarmupInverseSqrt(warmup),
            WarmupConstant(warmup),
        ):
            # The shortest piece is a tenth of the total; the steepest point of a cosine is pi/2 times its mean slope.
            steepest = math.pi / 2 / (0.1 * total - 1)
            assert max(map(abs, differences(curve(schedule, total)))) <= steepest

    @given(schedules())
    def test_the_constructors_total_overrides_the_calls(self, case: tuple[Schedule, int]) -> None:
        schedule, total = case
        fixed = copy.copy(schedule)
        fixed.total_steps = total
        assert not fixed.needs_total
        for other in (None, math.inf, 1, 7 * total):
            assert [fixed(step, other) for step in range(total + 2)] == curve(schedule, total, beyond=2)

    @given(schedules())
    def test_keeps_the_contract(self, case: tuple[Schedule, int]) -> None:
        """The laws of tests/contracts, which try the usual arguments, with any."""
        schedule, total = case
        for law in (
            laws.gives_numbers_that_multiply,
            laws.depends_on_the_step_alone,
            laws.peaks_where_its_warmup_ends,
            laws.starts_and_ends_where_it_says,
            laws.falls_after_its_warmup,
            laws.says_whether_it_needs_a_total,
            laws.survives_copies_and_pickles,
            laws.has_a_stable_repr,
        ):
            law(lambda: copy.deepcopy(schedule), total)

    @given(schedules())
    def test_the_representation_makes_it_again(self, case: tuple[Schedule, int]) -> None:
        schedule, total = case
        rebuilt = eval(repr(schedule))
        assert type(rebuilt) is type(schedule)
        assert vars(rebuilt) == vars(schedule)
        assert curve(rebuilt, total) == curve(schedule, total)


class TestWarmup:
    @pytest.mark.parametrize(
        ("warmup", "total", "steps"),
        [
            (1, 100, 1),
            (1.0, 100, 100),
            (0, 100, 0),
            (0.0, 100, 0),
            (0.05, 1000, 50),
            (0.05, 49, 2),
            (0.05, 50, 3),  # halves go up
            (0.05, 51, 3),
            (0.05, 1, 0),
            (30, 10, 10),
            (30, None, 30),
            (0.5, 0, 0),
        ],
    )
    def test_length(self, warmup: int | float, total: int | None, steps: int) -> None:
        assert WarmupConstant(warmup).warmup_steps(total) == steps

    @pytest.mark.parametrize("kind", ALL)
    def test_none_starts_at_the_peak(self, kind: type[Schedule]) -> None:
        assert kind(warmup=0, start=0.3)(0, 10) == 1.0

    def test_longer_than_the_training_is_cut_off(self) -> None:
        """As `fast_dev_run` does: one step, at the start of the warm-up; the end is reached all the same."""
        schedule = WarmupCosine(warmup=100, start=0.2, end=0.1)
        assert [schedule(step, 1) for step in range(3)] == [0.2, 0.1, 0.1]
        assert [schedule(step, 2) for step in range(3)] == [0.2, 0.6, 0.1]

    @pytest.mark.parametrize("kind", ALL)
    def test_longer_than_a_known_total_is_an_error(self, kind: type[Schedule]) -> None:
        with pytest.raises(ValueError, match=r"`warmup` must be at most `total_steps` = 10, got 11"):
            kind(warmup=11, total_steps=10)

    @pytest.mark.parametrize("schedule", [WarmupCosine(10, 10), WarmupStableDecay(10, 10, decay=0)], ids=repr)
    def test_as_long_as_a_known_total(self, schedule: Schedule) -> None:
        """The end comes first: the step `total_steps` has the end, not the peak."""
        assert schedule.warmup_steps() == 10
        assert [schedule(step) for step in (0, 5, 10, 11)] == [0.0, 0.5, 0.0, 0.0]


class TestTotal:
    @pytest.mark.parametrize("unknown", [None, math.inf])
    @pytest.mark.parametrize(
        "schedule",
        [*(kind(warmup=5) for kind in DECAYING), *(kind(warmup=0.1) for kind in ALL)],
        ids=repr,
    )
    def test_unknown_where_needed(self, schedule: Schedule, unknown: int | None) -> None:
        assert schedule.needs_total
        with pytest.raises(ValueError, match=f"pass `total_steps` to {type(schedule).__name__}"):
            schedule(0, unknown)
        with pytest.raises(ValueError, match="pass `total_steps`"):
            schedule.warmup_steps(unknown)

    @pytest.mark.parametrize("unknown", [None, math.inf])
    @pytest.mark.parametrize("warmup", [5, 0, 0.0])
    @pytest.mark.parametrize("kind", OPEN_ENDED)
    def test_unknown_where_not_needed(self, kind: type[Schedule], warmup: int | float, unknown: int | None) -> None:
        schedule = kind(warmup=warmup)
        assert not schedule.needs_total
        assert [schedule(step, unknown) for step in range(50)] == [schedule(step, 20) for step in range(50)]

    @pytest.mark.parametrize("kind", DECAYING)
    def test_nothing_to_train(self, kind: type[Schedule]) -> None:
        assert kind(end=0.25)(0, 0) == 0.25
        assert kind(warmup=7, end=0.25)(3, 0) == 0.25

    @pytest.mark.parametrize("kind", DECAYING)
    def test_one_step(self, kind: type[Schedule]) -> None:
        assert [kind(warmup=0, end=0.25)(step, 1) for step in range(3)] == [1.0, 0.25, 0.25]


class TestCosineRestarts:
    @example(cycles=49, length=1, warmup=0)  # 49 * (1 / 49) < 1
    @given(cycles=st.integers(1, 8), length=st.integers(1, 60), warmup=st.integers(0, 10))
    def test_cycles_of_whole_steps_are_the_same(self, cycles: int, length: int, warmup: int) -> None:
        total = warmup + cycles * length
        values = curve(WarmupCosine(warmup, end=0.1, cycles=cycles), total, beyond=0)[warmup:]
        first = curve(WarmupCosine(0, end=0.1), length, beyond=0)
        assert values == pytest.approx(first * cycles, abs=1e-14)
        assert values[::length] == [1.0] * cycles


class TestStableDecay:
    @pytest.mark.parametrize(
        ("decay", "total", "steps"), [(0.2, 100, 20), (7, 100, 7), (1.0, 100, 95), (500, 100, 95), (0, 100, 0)]
    )
    def test_length(self, decay: int | float, total: int, steps: int) -> None:
        schedule = WarmupStableDecay(warmup=5, decay=decay)
        assert schedule.decay_steps(total) == steps
        values = curve(schedule, total)
        # The last 1 before the decay, and the first after which it is below.
        assert values[total - steps - 1 if steps == 0 else total - steps] == 1.0
        assert values[total - steps + 1] < 1.0

    def test_halves_of_an_odd_total(self) -> None:
        schedule = WarmupStableDecay(warmup=0.5, decay=0.5, total_steps=3)
        assert (schedule.warmup_steps(), schedule.decay_steps()) == (2, 1)
        assert [schedule(step) for step in range(4)] == [0.0, 0.5, 1.0, 0.0]

    @pytest.mark.parametrize(
        "arguments",
        [
            {"warmup": 0.6, "decay": 0.5},
            {"warmup": 60, "decay": 50, "total_steps": 100},
            {"warmup": 95, "decay": 0.1, "total_steps": 100},
            {"warmup": 0.5, "decay": 51, "total_steps": 100},
        ],
    )
    def test_too_long_together(self, arguments: dict[str, int | float]) -> None:
        with pytest.raises(ValueError, match=r"`warmup` and `decay` together must be at most .*total"):
            WarmupStableDecay(**arguments)

    @pytest.mark.parametrize(
        "arguments", [{"warmup": 0.7, "decay": 0.3}, {"warmup": 60, "decay": 40, "total_steps": 100}]
    )
    def test_filling_the_total(self, arguments: dict[str, int | float]) -> None:
        schedule = WarmupStableDecay(**arguments)
        assert schedule.warmup_steps(100) + schedule.decay_steps(100) == 100


class TestScaled:
    @given(schedules(), st.floats(1e-3, 1e3))
    def test_is_the_other_schedule_times_the_factor(self, case: tuple[Schedule, int], factor: float) -> None:
        schedule, total = case
        scaled = Scaled(schedule, factor)
        assert curve(scaled, total) == [factor * value for value in curve(schedule, total)]
        assert scaled.needs_total == schedule.needs_total
        assert scaled.warmup_steps(total) == schedule.warmup_steps(total)
        assert scaled.warmup == schedule.warmup
        assert curve(eval(repr(scaled)), total) == curve(scaled, total)

    def test_knows_the_total_that_the_other_was_given(self) -> None:
        scaled = Scaled(WarmupCosine(warmup=2, total_steps=8), 3.0)
        assert (scaled.total_steps, scaled.needs_total, scaled(2), scaled(8)) == (8, False, 3.0, 0.0)
        assert scaled.plot().axes[0].lines[0].get_ydata().max() == 3.0

    def test_takes_a_schedule_and_a_positive_number(self) -> None:
        with pytest.raises(TypeError, match=r"`schedule` must be a schedule, such as .* got 1.0"):
            Scaled(1.0, 2.0)
        with pytest.raises(ValueError, match="`factor` must be a number > 0, got 0"):
            Scaled(WarmupCosine(), 0)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"warmup": -1}, ValueError, r"`warmup` must be steps .* got -1"),
            ({"warmup": 1.5}, ValueError, r"`warmup` must be .*a float in \[0, 1\].*, got 1.5"),
            ({"warmup": math.nan}, ValueError, r"`warmup` .* got nan"),
            ({"warmup": True}, TypeError, r"`warmup` .* got True of type bool"),
            ({"warmup": "5%"}, TypeError, r"`warmup` .* got '5%' of type str"),
            ({"warmup": None}, TypeError, r"`warmup` .* got None"),
            ({"total_steps": 0}, ValueError, r"`total_steps` must be an integer >= 1, got 0"),
            ({"total_steps": 10.0}, TypeError, r"`total_steps` must be an integer >= 1, got 10.0"),
            ({"start": -0.1}, ValueError, r"`start` must be a number >= 0 and <= 1, got -0.1"),
            ({"start": 1.1}, ValueError, r"`start` must be a number >= 0 and <= 1, got 1.1"),
            ({"start": math.nan}, ValueError, r"`start` .* got nan"),
        ],
    )
    @pytest.mark.parametrize("kind", ALL)
    def test_of_all(self, kind: type[Schedule], arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            kind(**arguments)

    @pytest.mark.parametrize(
        ("kind", "arguments", "error", "message"),
        [
            *((kind, {"end": 1.1}, ValueError, r"`end` must be a number >= 0 and <= 1, got 1.1") for kind in DECAYING),
            (WarmupCosine, {"cycles": 0}, ValueError, r"`cycles` must be an integer >= 1, got 0"),
            (WarmupCosine, {"cycles": 1.5}, TypeError, r"`cycles` must be an integer >= 1, got 1.5"),
            (WarmupStableDecay, {"decay": -1}, ValueError, r"`decay` must be steps .* got -1"),
            (WarmupStableDecay, {"shape": "sqrt"}, ValueError, r"`shape` must be one of 'linear', 'cosine', '1-sqrt'"),
            (WarmupInverseSqrt, {"timescale": 0}, ValueError, r"`timescale` must be an integer >= 1, got 0"),
        ],
    )
    def test_of_one(self, kind: type[Schedule], arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            kind(**arguments)

    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            ((-1, 10), ValueError, r"`step` must be an integer >= 0, got -1"),
            ((0.5, 10), TypeError, r"`step` must be an integer >= 0, got 0.5"),
            ((0, -1), ValueError, r"`total_steps` must be an integer >= 0, got -1"),
            ((0, 10.5), TypeError, r"`total_steps` must be an integer >= 0, got 10.5"),
        ],
    )
    def test_of_a_call(self, kind: type[Schedule], call: tuple, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            kind(warmup=2)(*call)


class TestRepresentation:
    def test_shows_all_arguments(self) -> None:
        assert repr(WarmupCosine(30, end=0.1)) == (
            "WarmupCosine(warmup=30, total_steps=None, start=0.0, end=0.1, cycles=1)"
        )

    def test_numpy_scalars_become_plain(self) -> None:
        schedule = WarmupCosine(np.int64(30), total_steps=np.int64(100), end=np.float64(0.5))
        assert repr(schedule) == "WarmupCosine(warmup=30, total_steps=100, start=0.0, end=0.5, cycles=1)"


class TestPlot:
    @settings(max_examples=10)
    @given(schedules())
    def test_draws_the_curve(self, case: tuple[Schedule, int]) -> None:
        schedule, total = case
        laws.can_be_drawn(lambda: schedule, total)

    def test_a_long_training_keeps_its_corners(self) -> None:
        schedule = WarmupLinear(warmup=12_347, total_steps=1_000_000)
        (line,) = schedule.plot().axes[0].lines
        points = dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
        assert len(points) <= 2002
        assert (points[0], points[12_347], points[1_000_000]) == (0.0, 1.0, 0.0)

    def test_saves_a_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "schedule.png"
        WarmupCosine().plot(100).savefig(path)
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_without_a_total(self) -> None:
        with pytest.raises(ValueError, match=r"`total_steps` must be an integer >= 1 to plot"):
            WarmupConstant(warmup=5).plot()
        with pytest.raises(ValueError, match=r"`total_steps` must be an integer >= 1, got 0"):
            WarmupConstant(warmup=5).plot(0)

    def test_matplotlib_is_imported_only_here_and_without_pyplot(self) -> None:
        code = (
            "import sys; from stability_callbacks.schedules import WarmupCosine\n"
            "assert 'matplotlib' not in sys.modules\n"
            "WarmupCosine().plot(10)\n"
            "assert 'matplotlib.pyplot' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"needs matplotlib: pip install .stability-callbacks\[plot\]"):
            WarmupCosine().plot(10)
