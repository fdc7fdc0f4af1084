"""What the recorder writes when something happens, and that it costs nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from stability_callbacks import FlightRecorder, GradientClipping, LRSchedule, Rollback, StepGuard, TrainingDivergedError
from stability_callbacks.clipping import NormClip
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.diagnosis import Incident, bundles, find_cause, isolated, read_bundle, read_incidents
from stability_callbacks.schedules import WarmupConstant
from tests.models import (
    MODELS,
    MemoryLogger,
    NormNet,
    ResumableLoader,
    TinyModel,
    TwoOptimizers,
    assert_same_bits,
    fit,
    fp16,
    make_batches,
    poison,
    seeded,
    sgd,
    training_state,
)

NAN = float("nan")


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)


class LogNet(TinyModel):
    """Takes the logarithm of its input, which is legal until an input is 0; dropout makes it depend on chance."""

    def __init__(self, optimizer: Any = sgd) -> None:
        super().__init__(optimizer)
        self.first = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Linear(4, 3))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logs = x.abs().log()  # where it breaks
        return nn.functional.cross_entropy(self.head(self.drop(self.first(logs))), y)


def zeroed(batch: Any) -> Any:
    return poison(batch, 0.0)


def record(directory: Path) -> list[Incident]:
    return read_incidents(directory / "incidents.jsonl")


@pytest.mark.parametrize("optimizer", [sgd, fused], ids=["known to the host", "on the device"])
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_a_skipped_step_is_one_incident_with_its_cause(optimizer: Any, log_every_n_steps: int, tmp_path: Path) -> None:
    batches = make_batches(9)
    batches[6] = zeroed(batches[6])
    recorder = FlightRecorder(tmp_path)
    model = seeded(LogNet, optimizer)
    trainer = fit(model, batches, [StepGuard(), recorder], log_every_n_steps=log_every_n_steps)
    [incident] = record(tmp_path)
    assert (incident.step, incident.epoch, incident.batch_idx, incident.rank) == (6, 0, 6, 0)
    assert (incident.kind, incident.action, incident.optimizer) == ("nonfinite", "skipped", "SGD")
    assert math.isnan(incident.evidence["loss"]) or math.isinf(incident.evidence["loss"])
    assert trainer.global_step == 9
    late = optimizer is fused and log_every_n_steps == 50
    if not late:  # then training has ended when it is known
        assert incident.operation == "log"
        assert incident.evidence["reason"] in ("pole", "domain")
        assert incident.module == ""
        assert "x.abs().log()  # where it breaks" in incident.source
    bundle = read_bundle(tmp_path / incident.bundle)
    assert_same_bits(bundle.batches, [batches[6]])
    assert [row.step for row in bundle.history] == list(range(9 if late else 7))
    assert [row.step for row in bundle.history if row.skipped] == [6]


def test_the_bundle_brings_the_fault_up_again_with_the_weights_and_dropout_of_the_step(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Noting(LogNet):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            mask = self.drop(torch.ones(16))
            seen.append(mask)
            return loss

    batches = make_batches(6)
    batches[4] = zeroed(batches[4])
    model = seeded(Noting)
    before: dict[str, Tensor] = {}

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                before.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(model, batches, [StepGuard(), FlightRecorder(tmp_path), Keep()])
    mask_in_step = seen[4]
    [path] = bundles(tmp_path / "bundles")
    bundle = read_bundle(path)
    assert_same_bits(dict(bundle.weights), before)
    fresh = Noting()
    fresh.load_state_dict(bundle.weights)
    seen.clear()
    with isolated(fresh, bundle.random_state):
        cause = find_cause(fresh, lambda: fresh.training_step(bundle.batches[0], 4))
    assert cause == bundle.cause
    assert_same_bits(seen[0], mask_in_step)


@pytest.mark.parametrize("optimizer", [sgd, fused], ids=["known to the host", "on the device"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_invisible_even_where_it_looks_for_causes(name: str, optimizer: Any, tmp_path: Path) -> None:
    if name == "sparse":
        optimizer = sgd
    batches = make_batches(8)
    batches[3] = poison(batches[3])

    def run(*more: Any) -> Any:
        model = seeded(MODELS[name], optimizer)
        trainer = fit(model, batches, [StepGuard(), *more])
        return training_state(model, trainer), torch.get_rng_state()

    assert_same_bits(run(FlightRecorder(tmp_path)), run())
    assert record(tmp_path)


def test_dropout_is_the_same_with_it(tmp_path: Path) -> None:
    batches = make_batches(8)
    batches[3] = zeroed(batches[3])

    def run(*more: Any) -> Any:
        model = seeded(LogNet)
        return training_state(model, fit(model, batches, [StepGuard(), *more]))

    assert_same_bits(run(FlightRecorder(tmp_path)), run())
    assert record(tmp_path)[0].operation == "log"


def test_what_the_model_logs_while_the_cause_is_looked_for_goes_nowhere(tmp_path: Path) -> None:
    class Logging(LogNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss.detach())
            return loss

    batches = make_batches(4)
    batches[2] = zeroed(batches[2])
    logger = MemoryLogger()
    model = seeded(Logging)
    fit(model, batches, [StepGuard(), FlightRecorder(tmp_path)], logger=logger)
    assert len(logger.values("train_loss")) == 4
    assert len([1 for _, metrics in logger.calls if "train_loss" in metrics]) == 4
    assert len(model.losses) == 4  # its own list is put back


def test_micro_batches_of_the_window_are_kept_and_the_bad_one_is_found(tmp_path: Path) -> None:
    batches = make_batches(12)
    batches[5] = zeroed(batches[5])
    fit(seeded(LogNet), batches, [StepGuard(), FlightRecorder(tmp_path)], accumulate_grad_batches=4)
    [incident] = record(tmp_path)
    assert (incident.step, incident.batch_idx, incident.operation) == (1, 7, "log")
    bundle = read_bundle(tmp_path / incident.bundle)
    assert_same_bits(bundle.batches, batches[4:8])
    assert bundle.meta["batch_indices"] == [4, 5, 6, 7]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    batches = make_batches(5)
    batches[2] = poison(batches[2])
    model, plain = seeded(TwoOptimizers), seeded(TwoOptimizers)
    fit(model, batches, [StepGuard(), FlightRecorder(tmp_path)])
    fit(plain, batches, [StepGuard()])
    incidents = record(tmp_path)
    assert [(each.optimizer, each.kind) for each in incidents] == [("SGD", "nonfinite"), ("SGD-1", "nonfinite")]
    assert all("batch" in each.evidence["cause"] for each in incidents)
    assert_same_bits(dict(model.state_dict()), dict(plain.state_dict()))


def test_each_kind_has_its_name(tmp_path: Path) -> None:
    batches = make_batches(90)
    batches[80] = poison(batches[80], 1e4)
    guard = StepGuard([NonFinite(), Spike(min_history=16), InputRange(50.0)])
    fit(seeded(NormNet), batches, [guard, FlightRecorder(tmp_path)])
    incidents = [each for each in record(tmp_path) if each.step == 80]
    assert [each.kind for each in incidents] == ["input"]
    assert incidents[0].evidence["input_magnitude"] == pytest.approx(1e4)
    assert read_bundle(tmp_path / incidents[0].bundle).batches is not None


def test_a_spike_has_a_bundle(tmp_path: Path) -> None:
    class Scaled(NormNet):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * batch[0].abs().max().clamp(min=10.0)

    batches = make_batches(40)
    batches[30] = poison(batches[30], 1e4)
    guard = StepGuard([NonFinite(), Spike(min_history=16)])
    fit(seeded(Scaled), batches, [guard, FlightRecorder(tmp_path)])
    incident = next(each for each in record(tmp_path) if each.step == 30)
    assert incident.kind == "spike"
    assert incident.module is None
    assert incident.bundle


def test_overflows_of_the_loss_scaler_are_no_faults(tmp_path: Path) -> None:
    fit(seeded(NormNet), make_batches(30), [StepGuard(), FlightRecorder(tmp_path)], plugins=[fp16(2.0**24)])
    incidents = record(tmp_path)
    assert {each.kind for each in incidents} == {"loss_scale"}
    assert all(each.bundle is None and each.module is None for each in incidents)


def test_rollbacks_and_refused_checkpoints_are_incidents(tmp_path: Path) -> None:
    class Ruin(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                with torch.no_grad():
                    next(pl_module.parameters()).view(-1)[0] = NAN

    guards = [StepGuard(), Rollback(every_n_steps=4, patience=2)]
    fit(seeded(NormNet), make_batches(8), [*guards, FlightRecorder(tmp_path / "one"), Ruin()])
    assert [each.kind for each in record(tmp_path / "one")] == ["nonfinite", "rollback"]
    assert record(tmp_path / "one")[0].evidence["cause"].count("net.0.weight")
    assert record(tmp_path / "one")[1].evidence["restored_step"] == 4
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    callbacks = [StepGuard(), FlightRecorder(tmp_path / "two"), Ruin(), checkpoint]
    with pytest.warns(UserWarning, match="not finite"):
        fit(seeded(NormNet), make_batches(7), callbacks, enable_checkpointing=True)
    assert [each.kind for each in record(tmp_path / "two")] == ["nonfinite", "checkpoint_refused"]


def test_every_step_is_in_the_history_whatever_the_cadence(tmp_path: Path) -> None:
    batches = make_batches(12)
    batches[10] = poison(batches[10])
    callbacks = [
        StepGuard(),
        GradientClipping(NormClip(0.3)),
        LRSchedule(WarmupConstant(warmup=10)),
        FlightRecorder(tmp_path, history=5),
    ]
    model = seeded(NormNet)
    fit(model, batches, callbacks, log_every_n_steps=50)
    bundle = read_bundle(tmp_path / record(tmp_path)[0].bundle)
    assert [row.step for row in bundle.history] == [6, 7, 8, 9, 10]
    assert [row.lr for row in bundle.history] == [pytest.approx((0.05 * step / 10,)) for step in (6, 7, 8, 9, 10)]
    assert [row.loss for row in bundle.history[:4]] == pytest.approx(model.losses[6:10])
    assert all(row.grad_norm_clipped <= 0.3 + 1e-6 < row.grad_norm for row in bundle.history[:4])
    assert set(bundle.history[0].norms) == {"net.0", "net.1", "net.3"}


def test_bundles_are_bounded(tmp_path: Path) -> None:
    batches = [poison(batch) if index % 2 else batch for index, batch in enumerate(make_batches(20))]
    fit(seeded(NormNet), batches, [StepGuard(), FlightRecorder(tmp_path, max_bundles=3)])
    assert len(record(tmp_path)) == 10
    assert len(bundles(tmp_path / "bundles")) == 3


@pytest.mark.parametrize(
    ("arguments", "has_batch", "has_cause"),
    [({"save_batch": False}, False, True), ({"trace": False}, True, False), ({"max_bytes": 2**20}, False, True)],
)
def test_parts_can_be_left_out(arguments: Any, has_batch: bool, has_cause: bool, tmp_path: Path) -> None:
    batches = make_batches(4)
    batches[2] = zeroed(batches[2])
    fit(seeded(LogNet), batches, [StepGuard(), FlightRecorder(tmp_path, **arguments)])
    [incident] = record(tmp_path)
    bundle = read_bundle(tmp_path / incident.bundle)
    assert (bundle.batches is not None, bundle.weights is not None) == (has_batch, has_batch)
    assert (bundle.cause is not None, incident.operation is not None) == (has_cause, has_cause)


def test_no_bundles_at_all(tmp_path: Path) -> None:
    batches = make_batches(4)
    batches[2] = zeroed(batches[2])
    fit(seeded(LogNet), batches, [StepGuard(), FlightRecorder(tmp_path, max_bundles=0)])
    assert [path.name for path in tmp_path.iterdir()] == ["incidents.jsonl"]


def test_a_run_in_which_nothing_happens_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(seeded(NormNet), make_batches(4), [StepGuard(), FlightRecorder(tmp_path / "record")])
    assert not (tmp_path / "record").exists()
    assert "What happened" not in capsys.readouterr().out


def test_counts_go_to_every_logger_and_a_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = make_batches(6)
    batches[2], batches[4] = poison(batches[2]), poison(batches[4])
    loggers = [MemoryLogger(), MemoryLogger()]
    recorder = FlightRecorder(tmp_path)
    fit(seeded(NormNet), batches, [StepGuard(), recorder], logger=loggers)
    for logger in loggers:
        assert logger.values("stability/incidents")[5] == 2
        assert logger.values("stability/incidents/nonfinite")[5] == 2
    assert recorder.incidents == {"nonfinite": 2}
    printed = capsys.readouterr().out
    assert "What happened in training" in printed
    assert "nonfinite" in printed


def test_a_disk_that_fails_is_warned_of_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in_the_way").write_text("a file")
    batches = [poison(batch) if index % 2 else batch for index, batch in enumerate(make_batches(6))]
    with pytest.warns(UserWarning, match="could not write") as warnings:
        trainer = fit(seeded(NormNet), batches, [StepGuard(), FlightRecorder(tmp_path / "in_the_way" / "record")])
    assert trainer.global_step == 6
    assert len([each for each in warnings if "could not write" in str(each.message)]) == 1


def test_the_default_place_is_beside_the_loggers_files(tmp_path: Path) -> None:
    batches = make_batches(4)
    batches[2] = poison(batches[2])
    logger = CSVLogger(tmp_path, name="run")
    fit(seeded(NormNet), batches, [StepGuard(), FlightRecorder()], logger=logger)
    assert (Path(logger.log_dir) / "flight_record" / "incidents.jsonl").exists()


def test_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    batches = make_batches(8)
    batches[2], batches[6] = poison(batches[2]), poison(batches[6])

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    first = [StepGuard(), FlightRecorder(tmp_path / "record"), Save()]
    fit(seeded(NormNet), ResumableLoader(batches), first, max_steps=4)
    recorder = FlightRecorder(tmp_path / "record")
    fit(NormNet(), ResumableLoader(batches), [StepGuard(), recorder], ckpt_path=tmp_path / "saved.ckpt")
    assert recorder.incidents == {"nonfinite": 2}
    assert [each.step for each in record(tmp_path / "record")] == [2, 6]


def test_a_checkpoint_right_after_a_rollback_knows_of_it(tmp_path: Path) -> None:
    batches = [poison(batch) if index == 2 else batch for index, batch in enumerate(make_batches(4))]
    recorder = FlightRecorder(tmp_path / "record")
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [StepGuard(), Rollback(patience=1), recorder, checkpoint]
    fit(seeded(NormNet), batches, callbacks, enable_checkpointing=True)
    counts = {}
    for step in (2, 3):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"][recorder.state_key]
        counts[step] = {kind: number for kind, (number, *_) in saved["summary"].items()}
    assert counts == {2: {}, 3: {"nonfinite": 1, "rollback": 1}}


def test_lines_are_strict_json(tmp_path: Path) -> None:
    batches = make_batches(4)
    batches[2] = poison(batches[2])
    fit(seeded(NormNet), batches, [StepGuard(), FlightRecorder(tmp_path)])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for line in (tmp_path / "incidents.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_an_exception_in_the_second_run_does_not_end_training(tmp_path: Path) -> None:
    class Once(LogNet):
        """Takes each batch only once."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def loss(self, batch: Any) -> Tensor:
            if id(batch) in self.seen:
                raise RuntimeError("this batch is exhausted")
            self.seen.append(id(batch))
            return super().loss(batch)

    batches = make_batches(5)
    batches[2] = zeroed(batches[2])
    trainer = fit(seeded(Once), batches, [StepGuard(), FlightRecorder(tmp_path)])
    assert trainer.global_step == 5
    assert "exhausted" in record(tmp_path)[0].evidence["cause"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"history": 0}, ValueError, "history"),
        ({"max_bundles": -1}, ValueError, "max_bundles"),
        ({"max_bytes": -1}, ValueError, "max_bytes"),
        ({"save_batch": 1}, TypeError, "save_batch"),
        ({"trace": "yes"}, TypeError, "trace"),
        ({"dirpath": 3}, TypeError, "dirpath"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"`{message}`"):
        FlightRecorder(**arguments)


# ---- telling it where people look


def test_the_cause_is_in_the_warning_the_error_and_the_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [poison(batch) for batch in make_batches(3)]
    with pytest.raises(TrainingDivergedError, match=r"batch\[0\] held \d+ NaN .*The weights are those after"):
        fit(NormNet(), [*make_batches(2), *bad], [StepGuard(max_consecutive_skips=3), FlightRecorder(tmp_path)])
    warnings = [record.getMessage() for record in caplog.records if "Skipped" in record.getMessage()]
    assert len(warnings) == 3
    assert all("; cause: batch[0] held" in warning for warning in warnings)
    assert "batch[0]" in capsys.readouterr().out


def test_the_error_of_a_rollback_that_gives_up_names_the_cause_too(tmp_path: Path) -> None:
    batches = [*make_batches(2), *map(poison, make_batches(6))]
    rollback = Rollback(patience=2, max_rollbacks=0, dirpath=tmp_path)
    with pytest.raises(TrainingDivergedError, match=r"The cause last found: batch\[0\] held \d+ NaN"):
        fit(NormNet(), batches, [StepGuard(), rollback, FlightRecorder(tmp_path)])


def test_incidents_beyond_the_searched_ones_share_their_cause(tmp_path: Path) -> None:
    batches = [poison(batch) for batch in make_batches(5)]
    fit(NormNet(), batches, [StepGuard(), FlightRecorder(tmp_path, max_bundles=2)])
    incidents = read_incidents(tmp_path / "incidents.jsonl")
    causes = [str(incident.evidence["cause"]) for incident in incidents]
    assert [cause.startswith("not looked for again; the 2 before: batch[0] held") for cause in causes] == [
        *[False] * 2,
        *[True] * 3,
    ]
    assert {incident.evidence["phase"] for incident in incidents} == {"input"}


def test_a_cause_is_not_shared_by_incidents_that_began_in_several_places(tmp_path: Path) -> None:
    class Two(LogNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx != 1 else (loss * 0 - 1).sqrt()

    batches = [make_batches(1)[0], make_batches(1)[0], *(poison(batch) for batch in make_batches(3))]
    fit(seeded(Two), batches, [StepGuard(), FlightRecorder(tmp_path, max_bundles=2)])
    *_, last = read_incidents(tmp_path / "incidents.jsonl")
    assert last.evidence["cause"] == "not looked for again: the 2 before began in 2 places"
    assert last.module is last.operation is None
