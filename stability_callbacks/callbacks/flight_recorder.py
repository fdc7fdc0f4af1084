"""The callback that records every intervention, and what led to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stability_callbacks._validation import check_bool, check_integer, check_path
from stability_callbacks.detection import input_magnitude
from stability_callbacks.diagnosis import (
    Cause,
    Failure,
    Incident,
    IncidentLog,
    RandomState,
    StepHistory,
    can_run_in_fork,
    find_cause,
    isolated,
    kind_of,
    make_room,
    run_in_fork,
    run_on_copy,
    tensor_bytes,
    write_bundle,
)
from stability_callbacks.engine import (
    STATE_VERSION,
    OptimizerStep,
    PendingRecord,
    Phase,
    StabilityCallback,
    StepRecord,
    Training,
    loss_of,
)

__all__ = ["FlightRecorder"]

# While the verdict of steps still lies on the device, their batches are kept; the oldest go when they take more.
_MOST_PENDING_BYTES = 256 * 2**20

# What a bundle takes besides tensors, about.
_TEXT_BYTES = 2**20


class FlightRecorder(StabilityCallback):
    """Records every intervention in training: what happened, where it began, and how to bring it up again.

    An observer: training is bit for bit what it is without it. The last steps are kept on the device at full
    resolution, whatever the logging cadence, and read only when something happens. Then

    - a line is added to ``incidents.jsonl``, see :class:`~stability_callbacks.diagnosis.Incident` for its fields;
    - for a step that was skipped, a directory under ``bundles`` gets the history as CSV and picture, the offending
      batch, the weights before the step and the random state, within the bounds given;
    - for a non-finite one the batch is run once more, in a copy of the process, to name the first module and operation
      that broke, and its line of source. Whatever ``training_step`` does besides (a teacher that it moves, batches that
      it draws from iterators, files that it writes) happens in the copy alone. Where a model is on an
      accelerator, or the system is not Linux, a deep copy of the model stands in; globals are not copied then. If it
      can't be made (a generator, an open file), the incident says so: replay the bundle.

    Of several processes, the one tells of an incident and writes its bundle in which the fault came up again, or else
    whose batch or loss shows it. Each runs its batch by itself: a sharded model, or a step in which processes meet (as
    in ``SyncBatchNorm``), can't be searched, and the incident says so.

    ``python -m stability_callbacks replay BUNDLE --model package.module:Class`` runs it again, and
    ``python -m stability_callbacks report DIRECTORY`` makes a page of it all. A table is printed at the end.

    With torch's fused optimizers the verdict is known up to one log interval late. The batches of that interval are
    kept meanwhile, up to 256 MiB of them; the weights in the bundle are those at the time when it is known.

    Args:
        dirpath: Where to write. Default: ``flight_record`` in the logger's directory, or in the trainer's
            ``default_root_dir``.
        history: Number of steps kept, >= 1. Default 256.
        save_batch: Whether bundles hold the batch, the weights and the random state. Default True.
        trace: Whether to look for the cause of non-finite steps. Default True.
        max_bundles: Number of bundles of the run, >= 0. Default 10. Those of other runs in the directory don't count,
            and are never removed.
        max_bytes: Bytes that all its bundles may take, >= 0. Default 2 GiB.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> from stability_callbacks import FlightRecorder, StepGuard
        >>> callbacks = [StepGuard(), FlightRecorder(history=512, max_bundles=3)]

    Metrics:
        ``stability/incidents``: number of incidents so far; ``stability/incidents/<kind>``: by kind.
    """

    phase = Phase.RECORD

    _summary: dict[str, _Summary]
    _histories: dict[str, StepHistory]
    _rates: dict[str, list[float | Tensor]]
    _window: list[_MicroBatch]
    _pending: dict[tuple[str | None, int], list[_MicroBatch]]
    _queue: list[Incident]
    _causes: dict[str, list[Cause]]
    _directory: Path
    _warned: bool
    _search_hung: bool
    _runs: list[str]

    def __init__(
        self,
        dirpath: str | Path | None = None,
        history: int = 256,
        save_batch: bool = True,
        trace: bool = True,
        max_bundles: int = 10,
        max_bytes: int = 2 * 2**30,
    ) -> None:
        super().__init__()
        self.dirpath = check_path("dirpath", dirpath)
        self.history = check_integer("history", history, at_least=1)
        self.save_batch = check_bool("save_batch", save_batch)
        self.trace = check_bool("trace", trace)
        self.max_bundles = check_integer("max_bundles", max_bundles, at_least=0)
        self.max_bytes = check_integer("max_bytes", max_bytes, at_least=0)
        self._state_key = self._generate_state_key(dirpath=str(dirpath))
        self._reset()

    @property
    def incidents(self) -> dict[str, int]:
        """Number of incidents so far, by kind."""
        self._catch_up(everywhere=False)
        return {kind: summary.number for kind, summary in self._summary.items()}

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        summary = {kind: list(summary) for kind, summary in self._summary.items()}
        return {"version": STATE_VERSION, "summary": summary, "runs": list(self._runs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._summary = {kind: _Summary(*summary) for kind, summary in state_dict.get("summary", {}).items()}
        self._runs = list(state_dict.get("runs", ()))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if trainer.global_step == 0:
                self._reset()
            self._forget()

    def prepare(self, training: Training) -> None:
        trainer = training.trainer
        self._directory = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "flight_record"
        self._runs = [*self._runs, training.run]
        self._histories = {step.label: StepHistory(self.history) for step in training.steps.values()}

    def on_optimizers_changed(self, training: Training) -> None:
        for step in training.steps.values():
            self._histories.setdefault(step.label, StepHistory(self.history))

    # ---- what is kept of each step

    def on_micro_batch(self, batch: Any, batch_idx: int, first: bool) -> None:
        if first:
            self._window = []
        if self.save_batch or self.trace:
            self._window.append(_MicroBatch(batch, batch_idx, RandomState.capture()))

    def before_update(self, step: OptimizerStep) -> None:
        self._rates[step.label] = step.rates.effective()

    def on_step_finished(self, step: OptimizerStep, record: PendingRecord) -> None:
        assert step.gradients is not None
        norms = step.gradients.norms()
        self._histories[step.label].add(
            record.global_step,
            norms.names,
            norms.per_tensor,
            record.values[: 4 + len(record.vote_kinds)],
            kinds=record.vote_kinds,
            epoch=record.epoch,
            batch_idx=record.batch_idx,
            lr=self._rates.pop(step.label, ()),
            loss_scale=step.loss_scale,
        )
        if step.skip is not None and step.skipped is not False:
            self._pending[step.label, record.global_step] = self._window
            self._drop_batches_that_take_too_much()

    def on_step_record(self, record: StepRecord) -> None:
        if not record.skipped:
            self._pending.pop((record.optimizer, record.global_step), None)

    # ---- what happens when something happened

    def on_incident(self, incident: Incident) -> None:
        if incident.optimizer is None and not self._queue:
            # All processes tell the same, there is no batch to look at, and a checkpoint may follow right away.
            self._write(self.training, incident)
        else:
            self._queue.append(incident)

    def examine(self, training: Training) -> None:
        self._write_queue(training, trace=self.trace)

    def finish_training(self, training: Training) -> None:
        self._write_queue(training, trace=False)
        if self._summary and training.trainer.is_global_zero:
            Console().print(self._table())
        self._forget()

    def host_scalars(self) -> Mapping[str, float]:
        by_kind = {f"stability/incidents/{kind}": float(summary.number) for kind, summary in self._summary.items()}
        return {"stability/incidents": sum(by_kind.values()), **by_kind}

    # ---- private

    def _write_queue(self, training: Training, trace: bool) -> None:
        queue, self._queue = self._queue, []
        for reported in queue:
            evidence = dict(reported.evidence)
            found_here = bool(evidence.pop("found_here", True))
            incident = replace(reported, evidence=evidence)
            if training.processes.several or training.trainer.is_global_zero:
                self._write(training, self._examine(training, incident, found_here, trace))

    def _write(self, training: Training, incident: Incident) -> None:
        self._count(incident)
        if training.trainer.is_global_zero:
            self._try(partial(IncidentLog(self._directory / "incidents.jsonl").append, incident))

    def _examine(self, training: Training, incident: Incident, found_here: bool, trace: bool) -> Incident:
        """Look for the cause of an incident, and let the process in which it began write a bundle and tell of it."""
        window = self._pending.pop((incident.optimizer, incident.step), [])
        cause = None
        nonfinite = "nonfinite" in str(incident.evidence.get("votes"))
        if trace and window and found_here and nonfinite:
            if self._few_of(incident.kind):
                cause = self._find_cause(training, window)
                self._causes.setdefault(incident.kind, []).append(cause)
            else:
                cause = _shared(self._causes.get(incident.kind, []))
        # Gradients that one process has ruined are ruined in all: what tells them apart is where the fault came up
        # again, and where the batch or the process's own loss shows it.
        reproduced = cause is not None and cause.reproduced
        bad_batch = found_here and nonfinite and _is_nonfinite(window)
        own_loss = float(incident.evidence.get("own_loss", 0.0))
        signs = training.processes.gather((reproduced, bad_batch, found_here, own_loss if isfinite(own_loss) else inf))
        began_in = [rank for rank, each in enumerate(signs) if each == max(signs)]
        if not training.processes.several or training.processes.rank == began_in[0]:
            incident = self._with_bundle(training, incident, window, cause)
        if training.processes.several:
            incident = training.processes.gather(incident)[began_in[0]]
            if len(began_in) > 1 and any(max(signs)[:2]):
                incident.evidence["ranks"] = ", ".join(map(str, began_in))
        if incident.evidence.get("phase"):  # a cause was found
            training.causes[incident.optimizer, incident.step] = str(incident.evidence["cause"])
        return incident

    def _with_bundle(
        self, training: Training, incident: Incident, window: list[_MicroBatch], cause: Cause | None
    ) -> Incident:
        """The incident with its cause and its bundle, which is written if that is possible."""
        if cause is not None:
            reason: dict[str, float | str] = {} if cause.reason is None else {"reason": cause.reason}
            incident = replace(
                incident,
                module=cause.module,
                operation=cause.operation,
                source=cause.source,
                evidence={**incident.evidence, "cause": cause.explanation, "phase": cause.phase or "", **reason},
            )
        if self.max_bundles and kind_of(incident.kind).bundled:
            path = self._try(partial(self._write_bundle, training, incident, window, cause))
            if path is not None:
                incident = replace(incident, bundle=str(path.relative_to(self._directory)))
        return incident

    def _few_of(self, kind: str) -> bool:
        """Whether the cause of another incident of a kind is worth a run; the first ones tell most."""
        return kind not in self._summary or self._summary[kind].number < max(self.max_bundles, 1)

    def _find_cause(self, training: Training, window: list[_MicroBatch]) -> Cause:
        module, precision = training.module, training.trainer.precision_plugin
        if training.is_sharded:
            return Cause.not_found("not looked for: the model is sharded, and one process can't run it alone")
        if self._search_hung:
            return Cause.not_found("not looked for: an earlier search did not end")
        batches = [micro_batch.batch for micro_batch in window]

        def search(module: nn.Module, batches: list[Any], forked: bool = True) -> Cause:
            for micro_batch, batch in zip(window, batches, strict=True):

                def run(batch: Any = batch, batch_idx: int = micro_batch.batch_idx) -> Tensor | None:
                    with precision.train_step_context():
                        return loss_of(module, batch, batch_idx)

                state = micro_batch.random_state
                random_state = state._replace(cuda=()) if forked else state
                with isolated(module, random_state), _Alone():  # type: ignore[no-untyped-call]
                    cause = find_cause(module, run, batch)
                if cause.reproduced:
                    break
            return cause

        if can_run_in_fork(module, batches):
            found = run_in_fork(partial(search, module, batches))
        else:
            found = run_on_copy(partial(search, forked=False), module, batches, shared=[training.trainer])
        if isinstance(found, Failure):
            self._search_hung = found.timed_out
            return Cause.not_found(str(found))
        return found

    def _write_bundle(
        self, training: Training, incident: Incident, window: list[_MicroBatch], cause: Cause | None
    ) -> Path | None:
        module, trainer = training.module, training.trainer
        assert incident.optimizer is not None
        directory = self._directory / "bundles"
        batches: list[Any] | None = [micro_batch.batch for micro_batch in window]
        is_sharded = training.is_sharded
        weights = None if is_sharded else module.state_dict()
        if not self.save_batch or not window:
            batches = weights = None
        room = partial(
            make_room,
            directory,
            max_bundles=self.max_bundles,
            max_bytes=max(self.max_bytes, 1),
            runs=self._runs,
        )
        if not room(tensor_bytes(batches) + tensor_bytes(weights) + _TEXT_BYTES):
            batches = weights = None
            if not room(_TEXT_BYTES):
                return None
        return write_bundle(
            directory,
            incident=incident,
            history=self._histories[incident.optimizer].rows(per="layer"),
            batches=batches,
            weights=weights,
            rng=window[0].random_state if batches else None,
            cause=cause,
            run=training.run,
            meta={
                "model": f"{type(module).__module__}:{type(module).__qualname__}",
                "hyper_parameters": dict(module.hparams_initial),
                "precision": str(trainer.precision),
                "batch_indices": [micro_batch.batch_idx for micro_batch in window],
                "accumulate": len(window),
                "weights_of_step": trainer.global_step,
                "without_weights": "the model is sharded" if is_sharded else None,
                "optimizer": incident.optimizer,
            },
        )

    def _drop_batches_that_take_too_much(self) -> None:
        while len(self._pending) > 1:
            windows = {id(window): window for window in self._pending.values()}
            batches = [micro_batch.batch for window in windows.values() for micro_batch in window]
            if tensor_bytes(batches) <= _MOST_PENDING_BYTES:
                return
            del self._pending[next(iter(self._pending))]

    def _count(self, incident: Incident) -> None:
        before = self._summary.get(incident.kind)
        place = (incident.source or "").partition(" in ")[0]
        where = ", ".join(filter(None, [incident.module, incident.operation, place]))
        if not where and incident.evidence.get("phase"):  # in the batch, say
            where = str(incident.evidence["cause"]).partition(" held ")[0]
        if before is None:
            self._summary[incident.kind] = _Summary(1, incident.step, incident.step, where, incident.bundle or "")
        else:
            self._summary[incident.kind] = before._replace(
                number=before.number + 1,
                last=incident.step,
                where=before.where or where,
                bundle=before.bundle or incident.bundle or "",
            )

    def _table(self) -> Table:
        table = Table(title="What happened in training", caption=f"The record is in {self._directory}")
        for column in ("kind", "count", "first step", "last step", "where it began", "first bundle"):
            is_number = column in ("count", "first step", "last step")
            table.add_column(column, justify="right" if is_number else "left", overflow="fold")
        for kind, (number, first, last, where, bundle) in self._summary.items():
            table.add_row(kind, str(number), str(first), str(last), where, bundle)
        return table

    def _try(self, write: Callable[[], Any]) -> Any:
        """Write something. If that fails it is warned of once: an observer must not end training."""
        try:
            return write()
        except Exception as error:  # noqa: BLE001  # `torch.save` has a RuntimeError for a full disk; others would wait
            if not self._warned:
                self._warned = True
                warnings.warn(f"FlightRecorder could not write to {self._directory}: {error!r}", stacklevel=2)
            return None

    def _reset(self) -> None:
        self._summary = {}
        self._causes = {}
        self._search_hung = False
        self._runs = []
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._histories, self._rates, self._window, self._pending, self._queue = {}, {}, [], {}, []


class _MicroBatch(NamedTuple):
    batch: Any
    batch_idx: int
    random_state: RandomState


class _Summary(NamedTuple):
    """The incidents of one kind."""

    number: int
    first: int
    last: int
    where: str
    bundle: str


class _Alone(TorchDispatchMode):
    """Refuses to wait for other processes, which do not run the batch again with this one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func.overloadpacket.__name__
            raise RuntimeError(f"this step needs all processes ({name}), and one can't run it alone")
        return func(*args, **(kwargs or {}))


def _shared(causes: Sequence[Cause]) -> Cause | None:
    """The cause of an incident that is not searched: the one that those of its kind share which were."""
    if not causes:
        return None
    last, places = causes[-1], {(each.phase, each.module, each.operation) for each in causes}
    if len(places) > 1:
        return Cause.not_found(f"not looked for again: the {len(causes)} before began in {len(places)} places")
    return last._replace(explanation=f"not looked for again; the {len(causes)} before: {last.explanation}")


def _is_nonfinite(window: Sequence[_MicroBatch]) -> bool:
    """Whether there is NaN or infinity in the batches."""
    magnitudes = [input_magnitude(micro_batch.batch) for micro_batch in window]
    return any(magnitude is not None and not torch.isfinite(magnitude) for magnitude in magnitudes)
