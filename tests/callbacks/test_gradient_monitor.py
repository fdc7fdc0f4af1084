"""What the monitor logs, against values computed by hand from the gradients and weights themselves."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import grad_norm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stability_callbacks import GradientClipping, GradientMonitor, LRSchedule, StepGuard
from stability_callbacks.clipping import NormClip, ValueClip
from stability_callbacks.schedules import WarmupCosine
from tests.models import MODELS, NormNet, SparseNet, TiedNet, TwoOptimizers, fit, make_batches, poison

Rows = dict[int, dict[str, float]]


class MemoryLogger(Logger):
    """Keeps what it is given, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)


class Truth(pl.Callback):
    """Measures by other means: Lightning's own `grad_norm`, and weights kept around each step."""

    def __init__(self, norm_type: float = 2.0) -> None:
        self.norm_type = norm_type
        self.norms: list[dict[str, float]] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms.append({name: float(norm) for name, norm in grad_norm(pl_module, self.norm_type).items()})
        self.before.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(self.after) < len(self.before):
            self.after.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


def run(
    callbacks: list[Any], model: Any = NormNet, batches: Any = None, **arguments: Any
) -> dict[int, dict[str, float]]:
    logger = MemoryLogger()
    pl.seed_everything(0, verbose=False)
    fit(model(), batches or make_batches(6), callbacks, logger=logger, **arguments)
    return logger.rows


def of_kind(row: dict[str, float], kind: str) -> dict[str, float]:
    return {name.removeprefix(f"{kind}/"): value for name, value in row.items() if name.startswith(f"{kind}/")}


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
def test_parameter_norms_are_lightnings(norm_type: float) -> None:
    truth = Truth(norm_type)
    rows = run([truth, GradientMonitor(norm_type, per="parameter", histograms=False)])
    assert len(rows) == 6
    for step, expected in enumerate(truth.norms):
        norms = of_kind(rows[step], "grad_norm")
        total = expected.pop(f"grad_{norm_type}_norm_total")
        assert norms.pop("total") == pytest.approx(total, rel=1e-3)  # Lightning rounds to four digits
        assert norms == pytest.approx(
            {name.removeprefix(f"grad_{norm_type}_norm/"): value for name, value in expected.items()},
            rel=1e-3,
            abs=1e-4,
        )


@pytest.mark.parametrize("model", MODELS)
def test_layer_norms_weight_norms_and_update_ratios(model: str) -> None:
    truth = Truth() if model != "sparse" else None
    rows = run([*([truth] if truth else []), GradientMonitor(histograms=False)], MODELS[model])
    for step, row in rows.items():
        layers = of_kind(row, "grad_norm")
        total = layers.pop("total")
        assert math.sqrt(sum(norm**2 for norm in layers.values())) == pytest.approx(total, rel=1e-5)
        if truth is None:
            continue
        before, after = truth.before[step], truth.after[step]
        for layer, norm in of_kind(row, "weight_norm").items():
            members = [name for name in before if name.rpartition(".")[0] == layer]
            expected = torch.cat([before[name].flatten() for name in members]).norm()
            assert norm == pytest.approx(float(expected), rel=1e-5)
            update = torch.cat([(after[name] - before[name]).flatten() for name in members]).norm()
            assert row[f"update_ratio/{layer}"] == pytest.approx(float(update / expected), rel=1e-3, abs=1e-7)


def test_names_of_tied_frozen_and_unused_parameters() -> None:
    row = run([GradientMonitor(per="parameter", histograms=False)], TiedNet)[0]
    assert set(of_kind(row, "grad_norm")) == {"total", "first.weight", "first.bias", "head.weight", "head.bias"}
    assert not any("frozen" in name or "second" in name for name in row)
    assert "weight_norm/unused.weight" in row


def test_a_parameter_of_the_root_module_is_a_layer_of_its_own() -> None:
    row = run([GradientMonitor(histograms=False)], SparseNet)[0]
    assert set(of_kind(row, "grad_norm")) == {"total", "embedding", "head", "temperature"}


def test_per_total_logs_totals_only() -> None:
    row = run([GradientMonitor(per="total", histograms=False)])[0]
    assert set(row) == {"grad_norm/total", "weight_norm/total", "update_ratio/total"}


def test_weights_and_updates_can_be_left_out() -> None:
    row = run([GradientMonitor(weights=False, updates=False, histograms=False)])[0]
    assert {name.partition("/")[0] for name in row} == {"grad_norm"}


def test_raw_and_clipped_norms_stand_apart() -> None:
    plain = run([GradientMonitor(histograms=False)])
    clipped = run([GradientClipping(NormClip(0.2)), GradientMonitor(histograms=False)])
    trainers = run([GradientMonitor(histograms=False)], gradient_clip_val=0.2)
    assert plain[0]["grad_norm/total"] > 0.2
    assert "grad_norm_clipped/total" not in plain[0]
    for rows in (clipped, trainers):
        assert rows[0]["grad_norm/total"] == plain[0]["grad_norm/total"]
        assert rows[0]["grad_norm_clipped/total"] == pytest.approx(0.2, rel=1e-4)


def test_value_clipping_is_measured_too() -> None:
    row = run([GradientClipping(ValueClip(0.01)), GradientMonitor(float("inf"), histograms=False)])[0]
    assert row["grad_norm_clipped/total"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"log_every_n_steps": 4}, [3, 7, 11]),
        ({"log_every_n_steps": 4, "accumulate_grad_batches": 3}, [3]),
        ({"log_every_n_steps": 0}, []),
    ],
)
def test_the_cadence_is_the_trainers_in_optimizer_steps(arguments: dict[str, Any], steps: list[int]) -> None:
    assert list(run([GradientMonitor(histograms=False)], batches=make_batches(12), **arguments)) == steps


def test_the_cadence_can_be_given() -> None:
    rows = run([GradientMonitor(every_n_steps=5, histograms=False)], batches=make_batches(12), log_every_n_steps=2)
    assert list(rows) == [4, 9]


def test_the_x_axis_is_that_of_self_log(tmp_path: Any) -> None:
    class Logs(NormNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    arguments = {"accumulate_grad_batches": 2, "max_epochs": 2, "log_every_n_steps": 2}
    rows = run([GradientMonitor(histograms=False)], Logs, make_batches(7), **arguments)
    ours = {step for step, row in rows.items() if "grad_norm/total" in row}
    theirs = {step for step, row in rows.items() if "loss" in row}
    assert ours <= theirs
    assert len(ours) == 4


def test_non_finite_norms_are_shown_and_ratios_of_zero_weights_are_not() -> None:
    class ZeroHead(NormNet):
        def __init__(self) -> None:
            super().__init__()
            torch.nn.init.zeros_(self.net[3].weight)
            torch.nn.init.zeros_(self.net[3].bias)

    batches = make_batches(3)
    rows = run([StepGuard(), GradientMonitor(histograms=False)], ZeroHead, [*batches[:2], poison(batches[2])])
    assert "update_ratio/net.3" not in rows[0]
    assert "update_ratio/net.3" in rows[1]
    assert math.isnan(rows[2]["grad_norm/total"])
    assert rows[2]["update_ratio/net.0"] == 0.0


def test_several_optimizers_have_totals_of_their_own() -> None:
    row = run([GradientMonitor(histograms=False)], TwoOptimizers)[0]
    one, two = row["grad_norm/total/SGD"], row["grad_norm/total/SGD-1"]
    assert row["grad_norm/total"] == pytest.approx(math.hypot(one, two), rel=1e-5)
    assert {"grad_norm/one.0", "grad_norm/two", "update_ratio/two"} <= set(row)


def test_gradients_that_carry_a_loss_scale_are_measured_without_it(tmp_path: Any) -> None:
    def fused(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)

    def scaled(fused_optimizer: bool, logger: Any) -> None:
        pl.seed_everything(0, verbose=False)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        model = NormNet(fused) if fused_optimizer else NormNet()
        monitor = GradientMonitor(histogram_every_n_steps=1)
        fit(model, make_batches(1), [monitor, GradientClipping(NormClip(0.2))], logger=logger, plugins=[plugin])

    rows, limits = [], []
    for index, fused_optimizer in enumerate((False, True)):
        memory, board = MemoryLogger(), TensorBoardLogger(tmp_path, version=index)
        scaled(fused_optimizer, [memory, board])
        rows.append(memory.rows[0])
        limits.append(histograms(board)["gradients/net.0.weight"][0].histogram_value.max)
    assert rows[1] == pytest.approx(rows[0], rel=1e-3)
    assert limits[1] == pytest.approx(limits[0], rel=1e-3)


def histograms(logger: TensorBoardLogger) -> dict[str, list[Any]]:
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    return {tag: events.Histograms(tag) for tag in events.Tags()["histograms"]}


def test_histograms_hold_every_finite_element_and_count_the_others(tmp_path: Any) -> None:
    logger, memory = TensorBoardLogger(tmp_path), MemoryLogger()
    batches = make_batches(4)
    batches[2] = poison(batches[2])
    pl.seed_everything(0, verbose=False)
    monitor = GradientMonitor(histogram_every_n_steps=1)
    fit(NormNet(), batches, [monitor, StepGuard()], logger=[logger, memory])
    tags = histograms(logger)
    parameters = {name for name, _ in NormNet().named_parameters()}
    assert set(tags) == {f"{kind}/{name}" for kind in ("gradients", "weights") for name in parameters}
    assert [event.step for event in tags["weights/net.0.weight"]] == [0, 1, 2, 3]
    assert [event.step for event in tags["gradients/net.0.weight"]] == [0, 1, 3]  # nothing finite in step 2
    assert all(event.histogram_value.num == 32 for event in tags["gradients/net.0.weight"])
    assert memory.rows[2]["grad_nonfinite/net.0.weight"] == 32
    assert not any("grad_nonfinite" in name for name in memory.rows[1])


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [1, 21, 41]),  # the first log step and every tenth
        ({"histogram_every_n_steps": 15}, [14, 29, 44]),
        ({"every_n_steps": 4}, [3, 43]),
        ({"histograms": False}, []),
    ],
)
def test_the_cadence_of_histograms(arguments: dict[str, Any], steps: list[int], tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(NormNet(), make_batches(50), [GradientMonitor(**arguments)], logger=logger, log_every_n_steps=2)
    assert [event.step for event in histograms(logger).get("gradients/net.0.bias", [])] == steps


def test_large_tensors_are_sampled(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(NormNet(), make_batches(1), [GradientMonitor(max_histogram_elements=10, weights=False)], logger=logger)
    tags = histograms(logger)
    assert not any(tag.startswith("weights") for tag in tags)
    assert tags["gradients/net.0.weight"][0].histogram_value.num <= 10


def test_other_loggers_get_scalars_and_no_error(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    fit(NormNet(), make_batches(2), [GradientMonitor(histogram_every_n_steps=1)], logger=logger)
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "grad_norm/total" in header
    assert "gradients/" not in header


def test_a_broken_histogram_writer_does_not_end_training(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(logger.experiment, "add_histogram_raw", broken)
    with pytest.warns(UserWarning, match="disk full"):
        trainer = fit(NormNet(), make_batches(3), [GradientMonitor(histogram_every_n_steps=1)], logger=logger)
    assert trainer.global_step == 3


def test_the_total_is_shown_in_the_progress_bar_if_asked() -> None:
    def shown(**arguments: Any) -> dict[str, Any]:
        callbacks = [StepGuard(), GradientMonitor(histograms=False, **arguments)]
        return fit(NormNet(), make_batches(2), callbacks, logger=False).progress_bar_metrics

    assert "grad_norm/total" in shown(progress_bar=True)
    assert "grad_norm/total" not in shown()


def test_two_monitors_get_along() -> None:
    monitors = [
        GradientMonitor(per="total", every_n_steps=1, histograms=False),
        GradientMonitor(per="layer", every_n_steps=3, histograms=False),
    ]
    rows = run([*monitors, LRSchedule(WarmupCosine())])
    assert [step for step, row in rows.items() if "grad_norm/net.0" in row] == [2, 5]
    assert all("grad_norm/total" in row for row in rows.values())


def test_two_norms_of_one_name_do_not_depend_on_the_order() -> None:
    def rows(flip: bool) -> Rows:
        monitors = [GradientMonitor(norm_type, per="total", histograms=False) for norm_type in (1.0, 2.0)]
        return run(monitors[::-1] if flip else monitors)

    assert rows(False) == rows(True)


def test_copies_before_and_after_a_fit() -> None:
    monitor = GradientMonitor(per="parameter", every_n_steps=2)
    for _ in range(2):
        for copied in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
            assert copied.per == "parameter"
            assert copied.every_n_steps == 2
        run([monitor])
    assert not monitor.state_dict()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"norm_type": 0}, ValueError, "norm_type"),
        ({"norm_type": "2"}, TypeError, "norm_type"),
        ({"per": "tensor"}, ValueError, "per"),
        ({"histograms": 1}, TypeError, "histograms"),
        ({"weights": None}, TypeError, "weights"),
        ({"updates": "yes"}, TypeError, "updates"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps"),
        ({"histogram_every_n_steps": -1}, ValueError, "histogram_every_n_steps"),
        ({"max_histogram_elements": 0}, ValueError, "max_histogram_elements"),
        ({"progress_bar": 1}, TypeError, "progress_bar"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"`{name}`"):
        GradientMonitor(**arguments)
