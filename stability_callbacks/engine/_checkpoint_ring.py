"""A ring of snapshots on disk, as checkpoints that ``Trainer.fit(ckpt_path=...)`` takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from stability_callbacks._atomic import atomic_path, remove_atomically
from stability_callbacks.engine._lightning import both, dump_checkpoint, unwrapped, without_optimizers
from stability_callbacks.engine._training_state import averaging_callbacks
from stability_callbacks.errors import TrainingDivergedError
from stability_callbacks.snapshots import BufferBackup, SnapshotRing

__all__ = ["CheckpointError", "CheckpointRing", "write_checkpoint"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointError(Exception):
    """A checkpoint can't be written or read; raised on every process."""


class CheckpointRing:
    """Keeps the last good states as Lightning checkpoints; to be used between optimizer steps.

    What no checkpoint holds, non-persistent buffers and the statistics of clip rules and detectors, stays in memory.

    Args:
        trainer: The trainer.
        state: Looks at the state of training; takes no snapshots itself.
        statistics: Objects whose state goes back with the snapshot.
        dirpath: Where the checkpoints are written.
        keep: Number of snapshots.
    """

    def __init__(
        self, trainer: pl.Trainer, state: SnapshotRing, statistics: Sequence[Any], dirpath: Path, keep: int
    ) -> None:
        self._trainer = trainer
        self._state = state
        self._statistics = statistics
        self._dirpath = dirpath
        self._keep = keep
        self._snapshots: list[_Snapshot] = []

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, oldest first."""
        return [snapshot.step for snapshot in self._snapshots]

    def nonfinite(self) -> tuple[tuple[str, ...], Tensor]:
        """Which tensors of the state are not finite; see :meth:`SnapshotRing.nonfinite`."""
        return self._state.nonfinite()

    def take(self, step: int) -> None:
        """Write a checkpoint, under its name only once it is complete on disk; one that can't be is done without."""
        path = self._dirpath / f"snapshot-step={step}.ckpt"
        trainer = self._trainer
        states = [_StateOf(optimizer) for optimizer in trainer.optimizers]
        try:
            write_checkpoint(trainer, path)
        except CheckpointError as error:
            _log.warning("The snapshot %s could not be written (%s); older ones are kept.", path, error)
            return
        buffers = BufferBackup(trainer.lightning_module)
        buffers.take()
        learnt = [deepcopy(item.state_dict()) for item in self._statistics]
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.step != step]
        self._snapshots.append(_Snapshot(step, path, states, buffers, learnt))
        while len(self._snapshots) > self._keep:
            self._discard(0)

    def drop_newest(self) -> None:
        """Forget the newest snapshot."""
        self._discard(-1)

    def restore(self) -> int:
        """Go back to the newest snapshot that can be read.

        Returns:
            Its step.

        Raises:
            TrainingDivergedError: If none can be read.
        """
        trainer = self._trainer
        # Hyper-parameters, learning rates above all, belong to the clock, which goes on; what `step()` writes does not.
        written = [self._state.written.get(unwrapped(optimizer), frozenset()) for optimizer in trainer.optimizers]
        kept = [
            [_without(group, keys) for group in optimizer.param_groups]
            for optimizer, keys in zip(trainer.optimizers, written, strict=True)
        ]
        while self._snapshots:
            snapshot = self._snapshots[-1]
            try:
                with _loadable(trainer, snapshot.states):
                    # Strategies that shard load into model and optimizers here already.
                    checkpoint = _together(trainer, partial(_load, trainer, snapshot.path))
            except CheckpointError as error:
                _log.warning("The snapshot %s can't be read (%s); trying an older one.", snapshot.path, error)
                self._snapshots.pop()
                continue
            self._restore(checkpoint, snapshot, kept)
            return snapshot.step
        raise TrainingDivergedError(f"None of the snapshots in {self._dirpath} can be read.")

    def _restore(self, checkpoint: dict[str, Any], snapshot: _Snapshot, kept: list[list[dict[str, Any]]]) -> None:
        trainer, strategy = self._trainer, self._trainer.strategy
        strategy.load_model_state_dict(checkpoint, strict=trainer.lightning_module.strict_loading)
        strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, state in zip(trainer.optimizers, snapshot.states, strict=True):
            if state.absent:
                optimizer.state.clear()
        for optimizer, groups in zip(trainer.optimizers, kept, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
        plugin = trainer.precision_plugin
        if (name := type(plugin).__qualname__) in checkpoint:
            plugin.load_state_dict(checkpoint[name])
        for callback in averaging_callbacks(trainer):
            callback.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
        snapshot.buffers.restore()
        for item, state in zip(self._statistics, snapshot.learnt, strict=True):
            item.load_state_dict(deepcopy(state))

    def _discard(self, index: int) -> None:
        snapshot = self._snapshots.pop(index)
        if not self._trainer.is_global_zero:
            return
        try:
            remove_atomically(snapshot.path)
        except OSError as error:
            _log.warning("The snapshot %s could not be removed (%s).", snapshot.path, error)


class _Snapshot(NamedTuple):
    step: int
    path: Path
    states: list[_StateOf]
    buffers: BufferBackup
    learnt: list[Any]


class _StateOf:
    """Which parameters an optimizer keeps a state of, as of now.

    Attributes:
        absent: Whether it has none at all, as before its first step.
        missing: The trainable parameters of which a checkpoint will hold none.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.absent = not optimizer.state
        # To read an optimizer without state, torch.distributed.checkpoint makes it one by a step, if there is no
        # gradient yet.
        made = self.absent and all(parameter.grad is None for parameter in parameters)
        self.missing = [each for each in parameters if each.requires_grad and not made and each not in optimizer.state]


@contextmanager
def _loadable(trainer: pl.Trainer, states: Sequence[_StateOf]) -> Iterator[None]:
    """While it lasts, torch.distributed.checkpoint finds what it needs to load states into optimizers.

    It asks for a state of every trainable parameter, in the optimizer and in the checkpoint.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, both(ModelParallelStrategy)):
        yield
        return
    missing = [parameter for state in states for parameter in state.missing]
    with without_optimizers(strategy, hidden=all(state.absent for state in states)) as optimizers:
        for optimizer in optimizers:
            optimizer.state.clear()
            optimizer.zero_grad()
        for parameter in missing:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in missing:
                parameter.requires_grad_(True)


def _without(group: dict[str, Any], written: AbstractSet[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in written}


def _load(trainer: pl.Trainer, path: Path) -> dict[str, Any]:
    return dict(trainer.strategy.load_checkpoint(path, weights_only=True))


def write_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Write a Lightning checkpoint, under its name only once it is complete on disk; to be called on every process.

    Unlike ``Trainer.save_checkpoint`` it leaves no process waiting for one whose disk is full, and optimizers as they
    were.

    Args:
        trainer: The trainer.
        path: The file or, where the strategy writes sharded checkpoints, the directory. What is there is replaced.

    Raises:
        CheckpointError: If it can't be written; nothing is left then. Raised on every process.
    """
    first, strategy = trainer.is_global_zero, trainer.strategy
    # See `_StateOf`.
    without_state = [optimizer for optimizer in trainer.optimizers if not optimizer.state]
    with ExitStack() as writing:
        # The first process tells strategies that write together where to.
        target = _together(trainer, lambda: writing.enter_context(atomic_path(path)) if first else path)

        def save() -> None:
            strategy.save_checkpoint(dump_checkpoint(trainer), target)

        def complete() -> None:
            if first and path.is_dir():
                remove_atomically(path)
            writing.close()

        try:
            _together(trainer, save)
        finally:
            for optimizer in without_state:
                optimizer.state.clear()
        _together(trainer, complete)


def _together(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """Do something on every process, and raise on all of them if one can't: none goes on to wait for another."""
    problem = ""
    try:
        result = work()
    except CheckpointException as error:  # all processes have one, with all that failed
        problem = ", ".join(f"rank {rank}: {failure!r}" for rank, (failure, _) in error.failures.items())
    except Exception as error:  # noqa: BLE001  # whatever a full disk or a damaged file gives rise to
        problem = repr(error)
    if trainer.strategy.reduce_boolean_decision(bool(problem), all=False):
        raise CheckpointError(problem or "another process failed")
    return result
