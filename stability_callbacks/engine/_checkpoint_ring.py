"""A ring of snapshots on disk, as checkpoints that ``Trainer.fit(ckpt_path=...)`` takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stability_callbacks._atomic import atomic_path, remove_atomically
from stability_callbacks._optimizers import parameters_of
from stability_callbacks.engine._lightning import (
    MisconfigurationException,
    both,
    dump_checkpoint,
    unwrapped,
    without_optimizers,
)
from stability_callbacks.engine._training_state import averaging_callbacks
from stability_callbacks.errors import TrainingDivergedError
from stability_callbacks.snapshots import BufferBackup, SnapshotRing

__all__ = ["CheckpointError", "CheckpointRing", "write_checkpoint"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# What a checkpoint of ours holds besides Lightning's.
_OWN = "stability_callbacks"

# Of a sharded checkpoint, the file with all that is not sharded.
_METADATA = "meta.pt"


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
        run: Names this run in its checkpoints. Those of others are never restored, replaced or removed.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        state: SnapshotRing,
        statistics: Sequence[Any],
        dirpath: Path,
        keep: int,
        run: str = "",
    ) -> None:
        self._trainer = trainer
        self._state = state
        self._statistics = statistics
        self._dirpath = dirpath
        self._keep = keep
        self._run = run
        self._snapshots: list[_Snapshot] = []
        self._underway: list[_Snapshot] = []

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, oldest first."""
        return [snapshot.step for snapshot in self._snapshots]

    def nonfinite(self) -> tuple[tuple[str, ...], Tensor]:
        """Which tensors of the state are not finite; see :meth:`SnapshotRing.nonfinite`."""
        return self._state.nonfinite()

    def check_directory(self) -> None:
        """Find out at train start whether the directory can be written to; to be called on every process.

        Raises:
            MisconfigurationException: If it can't be. It names the path and the reason.
        """

        def write() -> None:
            if self._trainer.is_global_zero:
                self._dirpath.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=self._dirpath) as file:
                    file.write(b"0")

        try:
            _together(self._trainer, write)
        except CheckpointError as error:
            raise MisconfigurationException(
                f"Rollback can't write its snapshots to {self._dirpath}: {error}. Give it another `dirpath`, or "
                '`storage="memory"`.'
            ) from error

    def entries(self) -> list[dict[str, Any]]:
        """Where the snapshots are, oldest first, for the state of a run; with the one that is being written."""
        return [snapshot.entry() for snapshot in (*self._snapshots, *self._underway)]

    def adopt(self, entries: Sequence[Mapping[str, Any]]) -> bool:
        """Take up the snapshots of the run that this one resumes. They stay its own: they are never removed.

        Those that are gone, or of another run, are named in a warning. Sharded ones, which hold no statistics of clip
        rules and detectors, are not taken up.

        Args:
            entries: What :meth:`entries` gave.

        Returns:
            Whether the newest one is there.
        """
        parameters = dict(self._trainer.lightning_module.named_parameters())
        for entry in entries:
            path, run = Path(entry["path"]), entry["run"]
            try:
                if _together(self._trainer, path.is_dir):
                    continue
                _together(self._trainer, partial(_check_owner, path, run))
            except CheckpointError as error:
                _log.warning("The snapshot %s can't be gone back to (%s).", path, error)
                continue
            known = [[parameters.get(name) for name in names] for names in entry["parameters"]]
            self._snapshots.append(_Snapshot(entry["step"], path, run, [], known, entry["parameters"]))
        del self._snapshots[: -self._keep]
        return bool(self._snapshots) and self._snapshots[-1].step == entries[-1]["step"]

    def take(self, step: int) -> None:
        """Write a checkpoint, under its name only once it is complete on disk; one that can't be is done without."""
        trainer = self._trainer
        states = [_StateOf(optimizer) for optimizer in trainer.optimizers]
        parameters = [parameters_of(optimizer) for optimizer in trainer.optimizers]
        name_of = {id(each): name for name, each in trainer.lightning_module.named_parameters()}
        names = [[name_of.get(id(each), "") for each in own] for own in parameters]
        buffers = BufferBackup(trainer.lightning_module)
        buffers.take()
        learnt = [deepcopy(item.state_dict()) for item in self._statistics]
        content = {"run": self._run, "learnt": learnt, "buffers": _nonpersistent_buffers(trainer.lightning_module)}
        for path in (self._dirpath / f"snapshot-step={step}{suffix}.ckpt" for suffix in ("", f"-{self._run}")):
            own = any(each.path == path and each.run == self._run for each in self._snapshots)
            if not own and trainer.strategy.broadcast(path.exists()):
                continue  # another run's
            snapshot = _Snapshot(step, path, self._run, states, parameters, names, buffers, learnt)
            self._underway = [snapshot]
            try:
                write_checkpoint(trainer, path, content, exclusive=not own)
                break
            except CheckpointError as error:
                if not own and trainer.strategy.broadcast(path.exists()):
                    continue  # another run was faster
                _log.warning("The snapshot %s could not be written (%s); older ones are kept.", path, error)
                return
            finally:
                self._underway = []
        else:
            _log.warning("There is a snapshot of step %d in %s already; older ones are kept.", step, self._dirpath)
            return
        self._snapshots = [each for each in self._snapshots if each.step != step]
        self._snapshots.append(snapshot)
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
                if _together(trainer, snapshot.path.is_dir):  # it is loaded in the same breath as it is read
                    _together(trainer, partial(_check_owner, snapshot.path, snapshot.run))
                with _loadable(trainer, snapshot.states):
                    # Strategies that shard load into model and optimizers here already.
                    checkpoint = _together(trainer, partial(_load, trainer, snapshot.path, snapshot.run))
            except CheckpointError as error:
                _log.warning("The snapshot %s can't be read (%s); trying an older one.", snapshot.path, error)
                self._snapshots.pop()
                continue
            self._restore(checkpoint, snapshot, kept)
            return snapshot.step
        raise TrainingDivergedError(f"None of the snapshots in {self._dirpath} can be read.")

    def _restore(self, checkpoint: dict[str, Any], snapshot: _Snapshot, kept: list[list[dict[str, Any]]]) -> None:
        trainer, strategy = self._trainer, self._trainer.strategy
        strict = trainer.lightning_module.strict_loading
        if not isinstance(strategy, both(ModelParallelStrategy)):
            # Nothing is changed before it is known that all fits.
            strict = strict and not _is_extended(trainer.lightning_module, checkpoint["state_dict"], snapshot.step)
            checkpoint["optimizer_states"] = [
                _for_groups_of_now(state, then, optimizer)
                for state, then, optimizer in zip(
                    checkpoint["optimizer_states"], snapshot.parameters, trainer.optimizers, strict=True
                )
            ]
        strategy.load_model_state_dict(checkpoint, strict=strict)
        strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, state in zip(trainer.optimizers, snapshot.states, strict=False):
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
        if snapshot.buffers is not None:
            snapshot.buffers.restore()
        else:
            _restore_buffers(trainer.lightning_module, checkpoint[_OWN]["buffers"])
        learnt = checkpoint[_OWN]["learnt"] if snapshot.learnt is None else snapshot.learnt
        for item, state in zip(self._statistics, learnt, strict=True):
            item.load_state_dict(deepcopy(state))

    def _discard(self, index: int) -> None:
        snapshot = self._snapshots.pop(index)
        if not self._trainer.is_global_zero or snapshot.run != self._run:
            return
        try:
            _check_owner(snapshot.path, self._run)
            remove_atomically(snapshot.path)
        except Exception as error:  # noqa: BLE001  # whatever a damaged file gives rise to; it is not known whose it is
            _log.warning("The snapshot %s could not be removed (%s).", snapshot.path, error)


class _Snapshot(NamedTuple):
    """A checkpoint, and what its file does not tell.

    Attributes:
        step: The step that it is of.
        path: Where it is.
        run: Whose it is.
        states: Which parameters had optimizer state; empty where that was another process.
        parameters: Those of each optimizer, in its order; None for one that is gone.
        names: Their names.
        buffers: All buffers; None where they are in the file alone.
        learnt: The statistics; None where they are in the file alone.
    """

    step: int
    path: Path
    run: str
    states: list[_StateOf]
    parameters: Sequence[Sequence[Tensor | None]]
    names: list[list[str]]
    buffers: BufferBackup | None = None
    learnt: list[Any] | None = None

    def entry(self) -> dict[str, Any]:
        """What finds it again in another process."""
        return {"step": self.step, "path": str(self.path.absolute()), "run": self.run, "parameters": self.names}


class _StateOf:
    """Which parameters an optimizer keeps a state of, as of now.

    Attributes:
        absent: Whether it has none at all, as before its first step.
        missing: The trainable parameters of which a checkpoint will hold none.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = parameters_of(optimizer)
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


def _load(trainer: pl.Trainer, path: Path, run: str) -> dict[str, Any]:
    checkpoint = dict(trainer.strategy.load_checkpoint(path, weights_only=True))
    _compare_owner(checkpoint, run)
    return checkpoint


def _check_owner(path: Path, run: str) -> None:
    """Raise an exception if a checkpoint can't be read or is another run's; of tensors nothing is read."""
    file = path / _METADATA if path.is_dir() else path
    _compare_owner(torch.load(file, map_location="meta", mmap=True, weights_only=True), run)


def _compare_owner(checkpoint: Mapping[str, Any], run: str) -> None:
    if checkpoint.get(_OWN, {}).get("run") != run:
        raise RuntimeError("it was written by another run")


def _for_groups_of_now(state: dict[str, Any], then: Sequence[Tensor | None], optimizer: Optimizer) -> dict[str, Any]:
    """A saved optimizer state as if its parameters had been grouped then as they are now; new ones have none."""
    places = {id(parameter): place for place, parameter in enumerate(then) if parameter is not None}
    now = parameters_of(optimizer)
    saved = state["state"]
    kept = {key: value for key, value in saved.items() if not isinstance(key, int)}
    kept |= {
        place: saved[places[id(parameter)]] for place, parameter in enumerate(now) if places.get(id(parameter)) in saved
    }
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes == [len(group["params"]) for group in state["param_groups"]]:
        return {**state, "state": kept}
    return {**state, "state": kept, "param_groups": optimizer.state_dict()["param_groups"]}


def _is_extended(module: nn.Module, saved: Mapping[str, Any], step: int) -> bool:
    """Whether a model has got new parameters or buffers since a checkpoint, which stay as they are.

    Raises:
        RuntimeError: If some are gone or have another shape.
    """
    live = module.state_dict()
    for name, value in saved.items():
        if isinstance(value, Tensor) and (name not in live or live[name].shape != value.shape):
            what = "is gone" if name not in live else "has another shape"
            raise RuntimeError(
                f"the state of step {step} can't be restored, because the model has been changed: {name!r} {what}"
            )
    return not live.keys() <= saved.keys()


def _nonpersistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    known = module.state_dict().keys()
    return {
        name: buffer.detach().clone()
        for name, buffer in module.named_buffers()
        if name not in known and not is_lazy(buffer)
    }


@torch.no_grad()
def _restore_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def write_checkpoint(
    trainer: pl.Trainer, path: Path, content: Mapping[str, Any] | None = None, exclusive: bool = False
) -> None:
    """Write a Lightning checkpoint, under its name only once it is complete on disk; to be called on every process.

    Unlike ``Trainer.save_checkpoint`` it leaves no process waiting for one whose disk is full, and optimizers as they
    were.

    Args:
        trainer: The trainer.
        path: The file or, where the strategy writes sharded checkpoints, the directory. What is there is replaced.
        content: What it holds besides.
        exclusive: Whether it is an error if there is something already.

    Raises:
        CheckpointError: If it can't be written; nothing is left then. Raised on every process.
    """
    first, strategy = trainer.is_global_zero, trainer.strategy
    # See `_StateOf`.
    without_state = [optimizer for optimizer in trainer.optimizers if not optimizer.state]
    with ExitStack() as writing:
        # The first process tells strategies that write together where to.
        target = _together(trainer, lambda: writing.enter_context(atomic_path(path, exclusive)) if first else path)

        def save() -> None:
            own = {} if content is None else {_OWN: dict(content)}
            strategy.save_checkpoint(dump_checkpoint(trainer) | own, target)

        def complete() -> None:
            if first and path.is_dir() and not exclusive:
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
