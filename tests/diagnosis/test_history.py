"""The ring of the last steps against a plain list, its table, and its picture."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

from stability_callbacks.diagnosis import StepHistory, StepRow, plot_history, read_history, write_history
from tests.host_reads import ForbidHostReads

NAN, INF = math.nan, math.inf
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NAMES = ("net.0.weight", "net.0.bias", "net.1.weight", "scale")
SKIPPED_COLOR, NON_FINITE_COLOR = "#e69f00", "#d55e00"

floats = st.floats(width=32)  # NaN and infinities too


@st.composite
def rows(draw: st.DrawFn) -> StepRow:
    """A row as a step gives it, with the norms of parameters."""
    names = draw(st.permutations(NAMES).flatmap(lambda names: st.integers(0, 4).map(lambda size: names[:size])))
    return StepRow(
        step=draw(st.integers(0, 10**9)),
        epoch=draw(st.integers(0, 99)),
        batch_idx=draw(st.integers(0, 99)),
        lr=tuple(draw(st.lists(st.floats(0, 10), max_size=3))),
        loss=draw(floats),
        grad_norm=draw(floats),
        grad_norm_clipped=draw(floats),
        clip_coefficient=draw(floats),
        verdict=tuple(draw(st.sets(st.sampled_from(["nonfinite", "spike", "input"])))),
        loss_scale=draw(st.none() | floats),
        norms={name: draw(floats) for name in names},
    )


def add(history: StepHistory, row: StepRow, kinds: tuple[str, ...] = ("nonfinite", "spike", "input"), **options: Any):
    numbers = [row.loss, row.grad_norm, row.grad_norm_clipped, row.clip_coefficient]
    history.add(
        row.step,
        tuple(row.norms),
        torch.tensor(list(row.norms.values())),
        torch.tensor([*numbers, *(float(kind in row.verdict) for kind in kinds)]),
        kinds=kinds,
        epoch=row.epoch,
        batch_idx=row.batch_idx,
        lr=options.get("lr", row.lr),
        loss_scale=options.get("loss_scale", row.loss_scale),
    )


def comparable(values: list[StepRow]) -> str:
    """NaN equals nothing, its representation does; kinds are a set, and so are norms."""
    return repr([
        row._replace(verdict=tuple(sorted(row.verdict)), norms=dict(sorted(row.norms.items()))) for row in values
    ])  # fmt: skip


def healthy(step: int, **changes: Any) -> StepRow:
    norms = {"net.weight": 3.0, "net.bias": 4.0, "scale": 1.0}
    return StepRow(step, 0, step, (0.125,), 0.5, 5.0, 1.0, 0.25, (), None, norms)._replace(**changes)


# ---- the ring


@given(st.lists(rows(), max_size=12), st.integers(1, 5))
@settings(max_examples=50)
def test_the_ring_holds_what_a_list_would(values: list[StepRow], size: int) -> None:
    history = StepHistory(size)
    for number, row in enumerate(values, start=1):
        add(history, row)
        assert len(history) == min(number, size)
    assert comparable(history.rows()) == comparable(values[-size:])


@given(st.lists(rows(), max_size=4))
@settings(max_examples=30)
def test_settings_may_lie_on_the_device(values: list[StepRow]) -> None:
    history = StepHistory()
    for row in values:
        on_device = [torch.tensor(rate) if index % 2 else rate for index, rate in enumerate(row.lr)]
        scale = None if row.loss_scale is None else torch.tensor(row.loss_scale)
        add(history, row, lr=on_device, loss_scale=scale)
    rounded = [
        row._replace(lr=tuple(float(np.float32(rate)) if index % 2 else rate for index, rate in enumerate(row.lr)))
        for row in values
    ]
    assert comparable(history.rows()) == comparable(rounded)


def test_a_setting_on_the_device_is_kept_as_it_was() -> None:
    history, rate = StepHistory(), torch.tensor(0.5)
    add(history, healthy(0), lr=[rate])
    rate.fill_(0.25)
    assert history.rows()[0].lr == (0.5,)


def test_which_parameters_have_gradients_may_change() -> None:
    history = StepHistory(3)
    for step, norms in enumerate([{"a": 1.0, "b": 2.0}, {"b": NAN}, {"c": 3.0, "a": 1.0, "d": 4.0}, {}]):
        add(history, healthy(step, norms=norms))
    assert [list(row.norms) for row in history.rows()] == [["b"], ["c", "a", "d"], []]
    assert math.isnan(history.rows()[0].norms["b"])
    assert history.rows()[1].norms == {"c": 3.0, "a": 1.0, "d": 4.0}


def test_kinds_that_are_looked_for_may_change() -> None:
    history = StepHistory()
    add(history, healthy(0), kinds=())
    add(history, healthy(1, verdict=("b",)), kinds=("a", "b"))
    add(history, healthy(2, verdict=("a",)), kinds=("a",))
    add(history, healthy(3, verdict=("a",)), kinds=("a", "a"))  # two detectors of one kind
    assert [row.verdict for row in history.rows()] == [(), ("b",), ("a",), ("a",)]
    assert [row.skipped for row in history.rows()] == [False, True, True, True]


def test_double_precision_is_kept() -> None:
    history = StepHistory(2)
    add(history, healthy(0))
    large = torch.tensor([1e300], dtype=torch.float64)
    history.add(1, ("a",), large, torch.cat([large, large, large, large]))
    assert history.rows()[0] == healthy(0)
    assert history.rows()[1].loss == history.rows()[1].norms["a"] == 1e300


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
def test_norms_of_layers_are_those_of_their_elements(norm_type: float) -> None:
    gradients = {name: torch.randn(3, dtype=torch.float64) for name in NAMES}
    history = StepHistory(norm_type=norm_type)
    norms = torch.stack([torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients.values()])
    history.add(0, NAMES, norms, torch.zeros(4))
    layers = history.rows(per="layer")[0].norms
    both = torch.cat([gradients["net.0.weight"], gradients["net.0.bias"]])
    assert list(layers) == ["net.0", "net.1", "scale"]
    assert layers["net.0"] == pytest.approx(float(torch.linalg.vector_norm(both, norm_type)))
    assert layers["scale"] == pytest.approx(float(torch.linalg.vector_norm(gradients["scale"], norm_type)))


def test_a_layer_without_gradients_has_no_norm_and_a_bad_one_has_a_bad_one() -> None:
    history = StepHistory()
    add(history, healthy(0, norms={"a.weight": 1.0, "b.weight": NAN, "b.bias": 1.0, "c.weight": INF}))
    add(history, healthy(1, norms={"b.bias": 2.0}))
    first, second = history.rows(per="layer")
    assert repr(first.norms) == repr({"a": 1.0, "b": NAN, "c": INF})
    assert second.norms == {"b": 2.0}


@pytest.mark.parametrize("device", DEVICES)
def test_adding_never_waits_for_the_device(device: str) -> None:
    history = StepHistory(2)
    per_tensor, numbers = torch.rand(3, device=device), torch.rand(6, device=device)
    rate = torch.tensor(0.1, device=device)
    reading = torch.cuda.get_sync_debug_mode if device == "cuda" else None
    if reading is not None:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ForbidHostReads():
            for step in range(5):
                history.add(
                    step, ("a", "b", "c"), per_tensor, numbers, kinds=("x", "y"), lr=(rate, 0.1), loss_scale=rate
                )
    finally:
        if reading is not None:
            torch.cuda.set_sync_debug_mode("default")
    assert len(history.rows()) == 2


def test_storage_is_allocated_once() -> None:
    history = StepHistory(3)
    add(history, healthy(0))
    addresses = [history._numbers.data_ptr(), history._norms.data_ptr()]
    for step in range(1, 9):
        add(history, healthy(step))
    assert [history._numbers.data_ptr(), history._norms.data_ptr()] == addresses
    names = history._host_parts[0].names
    assert all(part.names is names for part in history._host_parts)


def test_the_graph_of_a_loss_is_let_go() -> None:
    weight = torch.ones((), requires_grad=True)
    history = StepHistory()
    history.add(0, (), torch.zeros(0), torch.stack([weight * 2] * 4))
    assert not history._numbers.requires_grad
    assert history.rows()[0].loss == 2.0


def test_rows_need_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    history = StepHistory()
    for step in range(4):
        add(history, healthy(step), loss_scale=torch.tensor(2.0))
    transfers = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: transfers.append(1) or cpu(tensor))
    history.rows(per="layer")
    assert len(transfers) == 1


def test_it_can_be_cleared_copied_and_pickled() -> None:
    history = StepHistory(2, norm_type=INF)
    for step in range(3):
        add(history, healthy(step))
    for twin in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert twin.rows() == history.rows()
        add(twin, healthy(9))
        assert [row.step for row in twin.rows()] == [2, 9]
    assert repr(history) == "StepHistory(history=2, norm_type=inf)"
    history.clear()
    assert len(history) == 0
    assert history.rows() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": 0}, "`history` must be an integer >= 1, got 0"),
        ({"norm_type": 0}, "`norm_type` must be a number > 0, got 0"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepHistory(**arguments)


def test_shapes_that_do_not_fit_raise() -> None:
    history = StepHistory()
    with pytest.raises(ValueError, match=r"shapes \[1\] and \[4\].*got \[2\] and \[4\]"):
        history.add(0, ("a",), torch.zeros(2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"shapes \[1\] and \[5\].*got \[1\] and \[4\]"):
        history.add(0, ("a",), torch.zeros(1), torch.zeros(4), kinds=("spike",))
    with pytest.raises(ValueError, match="`per` must be one of 'parameter', 'layer', got 'total'"):
        history.rows(per="total")


# ---- the table


def rounded(row: StepRow) -> str:
    """What nine digits keep: every bit of a float32, and of a learning rate all."""
    numbers = [row.loss, row.grad_norm, row.grad_norm_clipped, row.clip_coefficient, *row.norms.values()]
    scale = None if row.loss_scale is None else np.float32(row.loss_scale)
    others = (row.step, row.epoch, row.batch_idx, row.lr, sorted(row.verdict), scale, sorted(row.norms))
    return repr(([np.float32(number) for number in numbers], others))


@given(st.lists(rows(), max_size=6))
@settings(max_examples=40)
def test_a_table_keeps_every_bit(tmp_path_factory: pytest.TempPathFactory, values: list[StepRow]) -> None:
    path = tmp_path_factory.mktemp("history") / "history.csv"
    write_history(values, path)
    for old, new in zip(values, read_history(path), strict=True):
        # A table has one order of columns for all of its rows.
        assert rounded(new._replace(norms={name: new.norms[name] for name in old.norms})) == rounded(old)


def test_names_may_hold_what_separates_columns(tmp_path: Path) -> None:
    row = healthy(0, norms={'a,"b"\n;c': 1.0, "": 2.0, "lr/pg2": 3.0})
    write_history([row], tmp_path / "history.csv")
    assert read_history(tmp_path / "history.csv") == [row]


def test_the_table_of_a_history_has_layers(tmp_path: Path) -> None:
    history = StepHistory()
    for step in range(3):
        add(history, healthy(step))
    history.to_csv(tmp_path / "history.csv")
    assert read_history(tmp_path / "history.csv") == history.rows(per="layer")
    header = (tmp_path / "history.csv").read_text().splitlines()[0]
    assert header.endswith(",loss_scale,grad_norm/net,grad_norm/scale")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("loss", "los"),
        lambda text: text[: text.rindex(",")] + "\n",
        lambda text: text.rstrip("\n") + ",3\n",
        lambda text: text.replace("0.125", "fast"),
        lambda text: "",
    ],
    ids=["column", "cells missing", "cells too many", "no number", "empty"],
)
def test_another_table_is_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "history.csv"
    write_history([healthy(0)], path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"history\.csv.*is not of a history"):
        read_history(path)


# ---- the picture


def colors(path: Path) -> Any:
    """How many pixels of the picture have a color, given as in matplotlib."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)

    def count(color: str) -> int:
        wanted = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
        return int((np.abs(pixels - wanted).max(axis=-1) <= 2).sum())

    return count


def test_a_picture_of_a_healthy_history(tmp_path: Path) -> None:
    history = StepHistory()
    for step in range(20):
        add(history, healthy(step, loss=1.0 + step, grad_norm=2.0 + step))
    history.plot(tmp_path / "healthy.png")
    count = colors(tmp_path / "healthy.png")
    in_legend = count(NON_FINITE_COLOR)
    for step in range(20, 23):
        add(history, healthy(step, loss=NAN, verdict=("nonfinite",), norms={"net.weight": NAN, "scale": INF}))
    history.plot(tmp_path / "bad.png")
    assert 0 < in_legend < colors(tmp_path / "bad.png")(NON_FINITE_COLOR) / 5
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bad.png", "healthy.png"]


@pytest.mark.parametrize(
    "values",
    [
        [healthy(3)],
        [healthy(3, loss=NAN, grad_norm=INF, grad_norm_clipped=NAN, norms={"a": NAN})],
        [healthy(0, loss=-1.0, lr=()), healthy(7, loss=2.0, lr=(0.0, 0.5), norms={})],
        [healthy(0, norms={}), healthy(1, norms={})],
        [healthy(step, grad_norm=0.0, norms={"a": 0.0}) for step in range(3)],
        [healthy(step, norms={f"{'very.' * 30}long.{layer}": 1.0 for layer in range(100)}) for step in range(3)],
        [healthy(5), healthy(5), healthy(2)],
        [healthy(0, loss=1e38, grad_norm=3e38, norms={"a": 3e38, "b": 1e-38})],
    ],
    ids=["one", "nothing finite", "negative loss", "no norms", "zeros", "many long names", "disorder", "extremes"],
)
def test_any_history_has_a_picture(tmp_path: Path, values: list[StepRow]) -> None:
    plot_history(values, tmp_path / "history.png")
    assert imread(tmp_path / "history.png").shape[0] > 600


def test_nothing_is_dropped_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure) or savefig(figure, *args, **kwargs)
    )
    values = [healthy(step) for step in range(10)]
    values[3] = healthy(3, loss=NAN, verdict=("nonfinite",))
    values[6] = healthy(6, grad_norm=INF, verdict=("nonfinite",))
    plot_history(values, tmp_path / "history.png")
    crosses = [[tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"] for axes in figures[0].axes]
    assert [marked for marked in crosses if marked] == [[(3,)], [(6,), ()], [()]]
    shaded = [len(axes.patches) for axes in figures[0].axes[:6:2]]
    assert shaded == [2, 2, 2]


def test_the_suffix_says_which_format(tmp_path: Path) -> None:
    plot_history([healthy(0)], tmp_path / "history.svg")
    assert "</svg>" in (tmp_path / "history.svg").read_text()


def test_without_steps_there_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        StepHistory().plot(tmp_path / "history.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"stability-callbacks\[plot\]"):
        plot_history([healthy(0)], tmp_path / "history.png")
    assert list(tmp_path.iterdir()) == []
