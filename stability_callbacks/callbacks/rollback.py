"""The callback that takes training back to the last good state."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from rich import filesize
from torch import Tensor

from stability_callbacks._validation import check_choice, check_integer, check_number, check_path
from stability_callbacks.detection import LossLevel, StepEvidence, SustainedRise
from stability_callbacks.diagnosis import describe_settings, vanishing_eps
from stability_callbacks.engine import (
    STATE_VERSION,
    CheckpointError,
    CheckpointRing,
    OptimizerStep,
    Phase,
    StabilityCallback,
    StepRecord,
    Training,
    averaged_models,
    find_nonfinite,
    loss_scaler,
    write_checkpoint,
)
from stability_callbacks.engine._lightning import MisconfigurationException
from stability_callbacks.snapshots import SnapshotRing

__all__ = ["Rollback"]

_log = logging.getLogger(__name__)

# A loss that stands out may be the first of a row: the state is not a good one until it is known to be the last.
_HIGH_LOSS = "high_loss"

# When the loss has risen since the last snapshot for so many of them, that is its level now.
_MOST_REFUSALS = 10

# Share of the free host memory that snapshots may take where no budget is given.
_SHARE_OF_FREE_MEMORY = 0.25


class Rollback(StabilityCallback):
    r"""Takes training back to the last good state when it has gone bad for more than a step.

    A :class:`~stability_callbacks.StepGuard` keeps single bad steps out; this is for what skipping can't heal: weights,
    buffers or optimizer state that are not finite, a loss that has risen and stays up, step after step skipped. It
    keeps a ring of snapshots (parameters, buffers, optimizer state, loss scaler, averaged models such as an EMA, and
    what clip rules and detectors have learned), each taken only when everything is finite and no step of the last
    ``patience`` ones was bad.

    A snapshot is on probation until the next one is due: if the loss has risen since by more than its noise (see
    :class:`~stability_callbacks.detection.LossLevel`), it is dropped and no new one is taken, so that damage which
    leaves all numbers finite and hides in a steeply falling loss is not what training goes back to. That is not the
    last one left, and the tenth time that a snapshot is refused in a row the new level counts.

    When called for, the newest snapshot is restored bit for bit. The clock is not rewound: schedulers, steps and data
    go on, so that the offending stretch of data is not met again. The learning rate is multiplied and recovers:

    .. math:: s_t = s_0 + (1 - s_0) \min\Big(1, \frac{t}{\text{lr\_recovery\_steps}}\Big), \qquad
              s_0 = \text{lr\_factor} \cdot s_{\text{before}}

    A relapse before a new snapshot was taken goes one snapshot further back. After ``max_rollbacks`` of them without
    ``lr_recovery_steps`` steps in peace, the last good state is saved as a checkpoint and training stops. A run that
    goes on from it counts failures anew. ``ckpt_path`` brings the old learning rate back too; to go on at another one,
    add a factor: ``LRSchedule(Scaled(WarmupConstant(warmup=0), 0.1))`` for a tenth. Where no step was ever accepted
    although the weights are finite, going back would change nothing: training stops at once.

    A resumed run goes back to the snapshots on disk of the run before it, as far as they are still there. Snapshots in
    memory are gone: the checkpoint that it was resumed from is the one to go back to then.

    Args:
        every_n_steps: A snapshot is due every so many optimizer steps, >= 1. Default 100.
        keep: Number of snapshots, >= 1. Default 2.
        patience: Number of bad steps in a row that call for a rollback, >= 1. Default 5.
        lr_factor: What the learning rate is multiplied by, in ``(0, 1]``. Default 0.5.
        lr_recovery_steps: Number of steps until the learning rate is back, >= 0. Default 500.
        max_rollbacks: Number of rollbacks in a row before training stops, >= 0. Default 3.
        storage: ``"memory"`` (default): copies in host memory, pinned if the model is on a GPU; ``"disk"``: Lightning
            checkpoints that ``Trainer.fit(ckpt_path=...)`` takes. Each holds the name of its run, and no run restores,
            replaces or removes those of another, so that several may share a directory.
        dirpath: Where checkpoints are written. Default: ``rollback`` in the logger's directory, or in the trainer's
            ``default_root_dir``.
        max_memory: Bytes of host memory that the snapshots of one process may take. Default: a quarter of the free
            memory, divided by the processes of the machine. What does not fit is not kept: fewer snapshots, or disk.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.
        MisconfigurationException: At train start, if a trained weight is NaN already, or if snapshots go to a directory
            that can't be written to.
        TrainingDivergedError: During training, see above; it names the checkpoint.

    Example:
        >>> from stability_callbacks import Rollback, StepGuard
        >>> callbacks = [StepGuard(), Rollback(every_n_steps=100, patience=5)]
        >>> callbacks[1].rollbacks
        0

    Metrics:
        ``stability/rollbacks``: number of rollbacks so far; ``stability/lr_scale``: the factor of the learning rate.
    """

    phase = Phase.RECOVER

    _rollbacks: int
    _rollbacks_in_row: int
    _scale_at_rollback: float
    _steps_since: list[int] | None
    _bad_in_row: dict[str, int]
    _steps_in_peace: int
    _rises: list[SustainedRise]
    _rising: set[str]
    _evidence: dict[str, StepEvidence]
    _snapshot_due: bool
    _relapse: bool
    _suspect_state: bool
    _accepted: bool
    _levels: dict[str, LossLevel]
    _refusals: int
    _entries: list[dict[str, Any]]
    _adoptable: list[dict[str, Any]]
    _found_by: int
    _diverged: str | None
    _ring: SnapshotRing | CheckpointRing | None
    _dirpath: Path | None

    def __init__(
        self,
        every_n_steps: int = 100,
        keep: int = 2,
        patience: int = 5,
        lr_factor: float = 0.5,
        lr_recovery_steps: int = 500,
        max_rollbacks: int = 3,
        storage: str = "memory",
        dirpath: str | Path | None = None,
        max_memory: int | None = None,
    ) -> None:
        super().__init__()
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, at_least=1)
        self.keep = check_integer("keep", keep, at_least=1)
        self.patience = check_integer("patience", patience, at_least=1)
        self.lr_factor = check_number("lr_factor", lr_factor, above=0, at_most=1)
        self.lr_recovery_steps = check_integer("lr_recovery_steps", lr_recovery_steps, at_least=0)
        self.max_rollbacks = check_integer("max_rollbacks", max_rollbacks, at_least=0)
        self.storage = check_choice("storage", storage, ("memory", "disk"))
        self.dirpath = check_path("dirpath", dirpath)
        self.max_memory = None if max_memory is None else check_integer("max_memory", max_memory, at_least=0)
        self._ring = None
        self._reset()

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks so far."""
        self._catch_up(everywhere=False)
        return self._rollbacks

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {
            "version": STATE_VERSION,
            "rollbacks": self._rollbacks,
            "rollbacks_in_row": self._rollbacks_in_row,
            "scale_at_rollback": self._scale_at_rollback,
            "steps_since": None if self._steps_since is None else list(self._steps_since),
            "bad_in_row": dict(self._bad_in_row),
            "steps_in_peace": self._steps_in_peace,
            "rises": [rise.state_dict() for rise in self._rises],
            "accepted": self._accepted,
            "relapse": self._relapse,
            "snapshot_due": self._snapshot_due,
            "levels": {optimizer: level.state_dict() for optimizer, level in self._levels.items()},
            "refusals": self._refusals,
            "snapshots": self._ring.entries() if isinstance(self._ring, CheckpointRing) else list(self._entries),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rollbacks = state_dict.get("rollbacks", 0)
        self._rollbacks_in_row = state_dict.get("rollbacks_in_row", 0)
        self._scale_at_rollback = state_dict.get("scale_at_rollback", 1.0)
        since = state_dict.get("steps_since")
        self._steps_since = None if since is None else list(since)
        self._bad_in_row = dict(state_dict.get("bad_in_row", {}))
        self._steps_in_peace = state_dict.get("steps_in_peace", 0)
        states = state_dict.get("rises", ())
        self._rises += [SustainedRise(self.patience) for _ in range(len(states) - len(self._rises))]
        for index, rise in enumerate(self._rises):
            rise.load_state_dict(states[index] if index < len(states) else {})
        self._accepted = state_dict.get("accepted", False)
        self._relapse = state_dict.get("relapse", False)
        self._snapshot_due = state_dict.get("snapshot_due", False)
        self._levels = {}
        for optimizer, state in state_dict.get("levels", {}).items():
            self._level_of(optimizer).load_state_dict(state)
        self._refusals = state_dict.get("refusals", 0)
        self._entries = self._adoptable = list(state_dict.get("snapshots", ()))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._diverged = None
        self._evidence = {}
        self._entries, self._adoptable = [], []
        if trainer.global_step == 0:
            self._reset()

    def prepare(self, training: Training) -> None:
        missing = len(training.steps) - len(self._rises)
        self._rises += [SustainedRise(self.patience) for _ in range(missing)]
        trainer = training.trainer
        self._dirpath = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "rollback"

    def begin_training(self, training: Training) -> None:
        self._ring = self._make_ring(training)
        if nonfinite := find_nonfinite(training, self._ring):
            raise MisconfigurationException(
                f"There is nothing good to go back to: {nonfinite.names[0]} is not finite before training has begun. "
                "Start from other weights or, on a resume, from an older checkpoint."
            )
        adoptable, self._adoptable = self._adoptable, []
        if not (isinstance(self._ring, CheckpointRing) and self._ring.adopt(adoptable)):
            self._ring.take(training.trainer.global_step)

    def on_optimizers_changed(self, training: Training) -> None:
        if self._ring is None:
            return
        self.prepare(training)
        if self._steps_since is not None:
            self._steps_since += [max(self._steps_since)] * (len(training.steps) - len(self._steps_since))
        while self._ring.steps:  # of parameters and optimizers that are no more
            self._ring.drop_newest()
        self._ring = self._make_ring(training)
        if nonfinite := find_nonfinite(training, self._ring):
            rank_zero_warn(
                f"The optimizers or their parameters were changed while {nonfinite} was not finite: until the next "
                "snapshot there is nothing that Rollback could go back to."
            )
            self._snapshot_due = True
        else:
            self._ring.take(training.trainer.global_step)

    def statistics(self) -> list[SustainedRise]:
        return list(self._rises)

    # ---- what happens in a step

    def compares_losses(self) -> bool:
        return True

    def watch(self, step: OptimizerStep) -> list[tuple[str, Tensor]]:
        assert step.gradients is not None
        rise = self._rises[step.index]
        if not step.gradients:
            return [(name, torch.zeros((), dtype=torch.bool)) for name in (rise.kind, _HIGH_LOSS)]
        evidence = self._evidence[step.label] = StepEvidence(step.loss, step.gradients.norms())
        sustained, stands_out = rise.judge(evidence)
        return [(rise.kind, sustained), (_HIGH_LOSS, stands_out)]

    def rate_multipliers(self, step: OptimizerStep) -> Sequence[float] | None:
        if self._steps_since is None:
            return None
        return [self._scale(self._steps_since[step.index])] * len(step.optimizer.param_groups)

    def on_step_attempted(self, step: OptimizerStep) -> None:
        if self._steps_since is not None:
            self._steps_since[step.index] += 1
        evidence = self._evidence.pop(step.label, None)
        if evidence is not None:
            norm = evidence.gradients.total
            accepted = torch.ones_like(norm, dtype=torch.bool) if step.skip is None else ~step.skip
            self._rises[step.index].update(evidence, accepted)

    def on_step_record(self, record: StepRecord) -> None:
        rising = SustainedRise.kind in record.watches
        (self._rising.add if rising else self._rising.discard)(record.optimizer)
        # A loss scaler's overflows are its search for the right scale.
        bad = record.skipped and record.kind != "loss_scale"
        if bad:
            self._bad_in_row[record.optimizer] = self._bad_in_row.get(record.optimizer, 0) + 1
            self._suspect_state = True
        elif not record.skipped:
            self._bad_in_row[record.optimizer] = 0
            self._accepted = True
            if _HIGH_LOSS not in record.watches:  # what stands out by itself is for that to judge
                self._level_of(record.optimizer).add(record.loss)
        self._steps_in_peace = 0 if bad or _HIGH_LOSS in record.watches else self._steps_in_peace + 1

    def needs_records(self, training: Training) -> bool:
        return self._snapshot_due or training.is_logging_step(self.every_n_steps)

    def after_batch(self, training: Training) -> None:
        self._snapshot_due = self._snapshot_due or training.is_logging_step(self.every_n_steps)
        if reason := self._reason(training):
            self._roll_back(training, reason)
        elif self._snapshot_due and self._steps_in_peace >= self.patience:
            self._snapshot_due = False
            if not self._refused():
                assert self._ring is not None
                training.reshard()
                self._ring.take(training.trainer.global_step)
                self._relapse = False
                for level in self._levels.values():
                    level.mark()
        if self._steps_since is not None and min(self._steps_since) >= max(self.lr_recovery_steps, self.every_n_steps):
            self._rollbacks_in_row = 0

    def forget_failures(self) -> None:
        self._rollbacks_in_row = self._steps_in_peace = 0
        self._bad_in_row = {}
        self._rising.clear()
        self._accepted = self._relapse = self._snapshot_due = False

    def divergence(self) -> str | None:
        return self._diverged

    def host_scalars(self) -> Mapping[str, float]:
        scale = 1.0 if self._steps_since is None else self._scale(max(self._steps_since))
        return {"stability/rollbacks": float(self._rollbacks), "stability/lr_scale": scale}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if isinstance(self._ring, CheckpointRing):
            self._entries = self._ring.entries()
        self._ring = None

    # ---- private

    def _reason(self, training: Training) -> str | None:
        """Why training must go back, if it must; the same on every rank."""
        self._found_by = 0
        if self._suspect_state or self._snapshot_due:
            self._suspect_state = False
            assert self._ring is not None
            if found := find_nonfinite(training, self._ring):
                self._found_by = found.rank
                return f"not finite: {found}"
        if max(self._bad_in_row.values(), default=0) >= self.patience:
            if not self._accepted:
                self._diverged = (
                    f"Training has diverged: no step was ever accepted, the first {self.patience} were all skipped, "
                    "and yet the weights are finite. Going back would change nothing: look for a bug in the loss or "
                    "in the data, such as a batch with NaN, the logarithm of zero or a division by zero."
                )
                return None
            return f"{self.patience} steps in a row were skipped"
        if self._rising:
            return f"the loss stayed far above its recent values for {self.patience} steps"
        return None

    def _roll_back(self, training: Training, reason: str) -> None:
        assert self._ring is not None
        if not self._ring.steps:
            self._diverged = (
                f"Training has diverged: {reason}. There is no snapshot since the optimizers or their parameters were "
                "changed. Start again from an older checkpoint."
            )
            return
        if self._relapse and len(self._ring.steps) > 1:
            self._ring.drop_newest()
        else:
            self._drop_if_risen()
        training.reshard()
        told = training.processes.gather(next(filter(None, map(vanishing_eps, training.steps)), None))
        step = self._ring.restore()
        if fault := next(filter(None, told), None):
            action = f"restored the state of step {step}, training ends"
            training.report(training.incident("update_arithmetic", {"setting": fault}, action, self._found_by))
            self._give_up(training, f"{reason}, made so by the optimizer from finite gradients: {fault}", step)
            return
        if self._rollbacks_in_row >= self.max_rollbacks:
            self._give_up(training, reason, step)
            return
        self._rollbacks += 1
        self._rollbacks_in_row += 1
        before = 1.0 if self._steps_since is None else self._scale(min(self._steps_since))
        self._scale_at_rollback = before * self.lr_factor
        self._steps_since = [0] * len(training.steps)
        self._bad_in_row, self._steps_in_peace, self._relapse = {}, 0, True
        self._rising.clear()
        for level in self._levels.values():
            level.restart()
        training.state_was_replaced()
        action = f"restored the state of step {step}, learning rate times {self._scale_at_rollback:g}"
        self._announce(training, reason, action)
        evidence: dict[str, float | str] = {"reason": reason, "restored_step": step}
        evidence["lr_scale"] = self._scale_at_rollback
        training.report(training.incident("rollback", evidence, action, self._found_by))

    def _give_up(self, training: Training, reason: str, step: int) -> None:
        assert self._dirpath is not None
        path = self._dirpath / f"last-good-step={step}.ckpt"
        self._catch_up()
        rollbacks = self._rollbacks_in_row
        training.forget_failures()
        try:
            write_checkpoint(training.trainer, path)
            where = (
                f"is in {path}; go on from it with Trainer.fit(ckpt_path=...), which counts failures anew but brings "
                "the old learning rate back: LRSchedule(Scaled(WarmupConstant(warmup=0), 0.1)) makes it a tenth. Try a"
            )
        except CheckpointError as error:
            where = f"could not be written to {path} ({error}). Start again from an older checkpoint with a"
        counted = f", after {rollbacks} rollbacks in a row (max_rollbacks)" if rollbacks else ""
        optimizers = ", ".join(map(describe_settings, training.steps))
        cause = next(reversed(training.causes.values()), None)
        caused = "" if cause is None else f"The cause last found: {cause}. "
        self._diverged = (
            f"Training has diverged: {reason}{counted}. {caused}Updates were made by {optimizers}. "
            f"The last good state, of step {step}, {where} lower learning rate, harder clipping or other data."
        )

    def _refused(self) -> bool:
        """Whether the state is none to go back to, by its loss; so is the last one then, which was on probation."""
        if not self._has_risen():
            self._refusals = 0
            return False
        self._refusals += 1
        if self._refusals >= _MOST_REFUSALS:
            self._refusals = 0
            return False
        if self._refusals == 1:
            self._drop_if_risen()
        return True

    def _drop_if_risen(self) -> None:
        """Drop the newest snapshot if the loss has risen since: what ruined it may have been there already."""
        assert self._ring is not None
        if len(self._ring.steps) > 1 and self._refusals <= 1 and self._has_risen():
            self._ring.drop_newest()

    def _has_risen(self) -> bool:
        return any(level.has_risen() for level in self._levels.values())

    def _level_of(self, optimizer: str) -> LossLevel:
        return self._levels.setdefault(optimizer, LossLevel())

    def _scale(self, steps: int) -> float:
        """The factor of the learning rate, some steps after the last rollback."""
        if steps >= self.lr_recovery_steps:
            return 1.0
        return self._scale_at_rollback + (1 - self._scale_at_rollback) * steps / self.lr_recovery_steps

    def _make_ring(self, training: Training) -> SnapshotRing | CheckpointRing:
        trainer = training.trainer
        assert self._dirpath is not None
        learnt = training.statistics()
        training.reshard()
        ring = SnapshotRing(
            training.module,
            list(training.steps),
            keep=self.keep,
            scaler=loss_scaler(trainer),
            averaged=averaged_models(trainer),
            stateful=learnt,
            written={step.optimizer: step.written_entries for step in training.steps.values()},
        )
        on_disk = CheckpointRing(trainer, ring, learnt, self._dirpath, self.keep, training.run)
        if self.storage == "disk":
            on_disk.check_directory()
            return on_disk
        needed, budget = ring.estimated_bytes(), self._budget(trainer)
        fitting = training.processes.least(min(self.keep, budget // max(needed, 1)))
        size = f"a snapshot takes {filesize.decimal(needed)} of host memory"
        if fitting == self.keep:
            rank_zero_info(f"Rollback keeps {self.keep} snapshots: {size}.")
            return ring
        too_much = f"{size}, and {self.keep} of them exceed the {filesize.decimal(budget)} that they may take"
        if fitting >= 1:
            rank_zero_warn(f"Rollback keeps {fitting} of {self.keep} snapshots: {too_much} (max_memory).")
            ring.resize(fitting)
            return ring
        rank_zero_warn(f"Rollback writes its snapshots to {self._dirpath}: {too_much} (max_memory).")
        on_disk.check_directory()
        return on_disk

    def _budget(self, trainer: pl.Trainer) -> int:
        if self.max_memory is not None:
            return self.max_memory
        return int(_SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available / max(trainer.num_devices, 1))

    @rank_zero_only
    def _announce(self, training: Training, reason: str, action: str) -> None:
        where = f"step {training.trainer.global_step} (epoch {training.trainer.current_epoch})"
        _log.warning("Rollback %d at %s: %s; %s.", self._rollbacks, where, reason, action)

    def _reset(self) -> None:
        self._rollbacks = self._rollbacks_in_row = self._steps_in_peace = 0
        self._scale_at_rollback = 1.0
        self._steps_since = self._diverged = self._dirpath = None
        self._found_by = self._refusals = 0
        self._accepted = False
        self._levels, self._entries, self._adoptable = {}, [], []
        self._bad_in_row, self._rises, self._rising, self._evidence = {}, [], set(), {}
        self._snapshot_due = self._relapse = self._suspect_state = False
