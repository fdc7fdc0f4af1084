"""All that this package uses of Lightning's private API, and Lightning's two packages as one.

``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one code, whose classes know nothing of each other.
Our callbacks and errors are of both kinds, and what a user's objects are is asked with :func:`both`.

Read in Lightning 2.6.6. A name that a later version no longer has is reported at train start, see
:func:`check_private_names`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities import exceptions
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric

__all__ = [
    "Callback",
    "MisconfigurationException",
    "attached_trainer",
    "batch_is_processed",
    "batches_that_stepped",
    "both",
    "callbacks_of",
    "check_private_names",
    "checkpoint_decisions",
    "configured_optimizers",
    "drawn_batch",
    "dump_checkpoint",
    "is_placeholder",
    "log_every_n_steps",
    "prepared_batch",
    "should_accumulate",
    "training_loaders",
    "training_results",
    "untoggle_optimizers",
    "unwrapped",
    "without_optimizers",
]

T = TypeVar("T")

_READ_IN = "2.6.6"

# The package `lightning` holds two that are also distributed by themselves. It requires them, and it may still be that
# they are not there, or can't be imported beside it.
_TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
with suppress(ImportError):
    import_module("pytorch_lightning")

_NAMES_OF_TRAINER = (
    "_checkpoint_connector.dump_checkpoint",
    "fit_loop._should_accumulate",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop.batch_progress.current.processed",
    "fit_loop.epoch_loop._results",
)


def both(kind: type[T]) -> tuple[type[T], ...]:
    """A class of ``lightning``, and its twin in ``pytorch_lightning`` if it has one: for ``isinstance``, and as bases.

    Args:
        kind: A class of ``lightning.pytorch`` or ``lightning.fabric``.

    Example:
        >>> isinstance(pl.LightningModule(), both(pl.LightningModule))
        True
        >>> [each.__module__ for each in both(pl.LightningModule)]
        ['lightning.pytorch.core.module', 'pytorch_lightning.core.module']
    """
    for ours, theirs in _TWINS.items():
        if kind.__module__.startswith(f"{ours}."):
            # A twin whose module was never imported has no objects; one of another version may have no such class.
            module = sys.modules.get(kind.__module__.replace(ours, theirs, 1))
            twin = getattr(module, kind.__name__, None)
            return (kind,) if twin is None else (kind, twin)
    return (kind,)


if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback
else:

    class Callback(*both(pl.Callback)):
        """A callback of both packages: either's ``Trainer(callbacks=...)`` and ``LightningCLI`` take a lone one."""

    class MisconfigurationException(*both(exceptions.MisconfigurationException)):
        """An error that those who catch either package's ``MisconfigurationException`` catch."""


def check_private_names(trainer: pl.Trainer) -> None:
    """Refuse a version of Lightning in which a private name that training relies on is gone.

    Raises:
        MisconfigurationException: If one is. It names the versions.
    """
    for name in _NAMES_OF_TRAINER:
        try:
            attrgetter(name)(trainer)
        except AttributeError as error:
            raise MisconfigurationException(
                f"Lightning {_version_of(trainer)} has no `Trainer.{name}` any more, which the stability callbacks "
                f"rely on ({error}). They were written for Lightning {_READ_IN}: install that version, or a newer "
                "version of stability-callbacks."
            ) from error


def _version_of(trainer: pl.Trainer) -> str:
    """The version of the package that a trainer is from."""
    package = next(kind.__module__.partition(".")[0] for kind in both(pl.Trainer) if isinstance(trainer, kind))
    return str(import_module(package).__version__)


# ---- where training stands


def batches_that_stepped(trainer: pl.Trainer) -> int:
    """The x-axis that ``self.log`` uses."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_every_n_steps(trainer: pl.Trainer) -> int:
    """The trainer's cadence; 0 for never."""
    cadence: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return cadence


def training_results(trainer: pl.Trainer) -> Iterable[Metric]:
    """The running results of ``self.log`` in the training epoch."""
    results: dict[str, Metric] = trainer.fit_loop.epoch_loop._results
    return results.values()


def should_accumulate(trainer: pl.Trainer) -> bool:
    """Whether the current batch is not the last of its window of gradient accumulation."""
    return trainer.fit_loop._should_accumulate()


def batch_is_processed(trainer: pl.Trainer) -> bool:
    """Whether the forward and backward pass and the step of the current batch are over."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """The training loaders; none where training has no batches."""
    loaders = trainer.fit_loop._combined_loader
    return [] if loaders is None else list(loaders.flattened)


def drawn_batch(trainer: pl.Trainer) -> Any:
    """The first training batch, from iterators of its own."""
    loaders = trainer.fit_loop._combined_loader
    assert loaders is not None
    batch, _, _ = next(iter(type(loaders)(loaders.iterables, loaders._mode)))
    return batch


def prepared_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """The batch of rank 0 as hooks, precision and strategy prepare it for a training step."""
    batch = trainer.precision_plugin.convert_input(trainer.strategy.broadcast(batch))
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


# ---- whom a trainer knows


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's own list of callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def attached_trainer(module: nn.Module) -> Any | None:
    """The trainer, or what stands in for it, that a module is attached to."""
    return getattr(module, "_trainer", None)


# ---- optimizers


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside of what Lightning hands out."""
    inner: Optimizer = optimizer.optimizer if isinstance(optimizer, both(LightningOptimizer)) else optimizer
    return inner


def is_placeholder(optimizer: Optimizer) -> bool:
    """Whether an optimizer only stands in for one that ``configure_optimizers`` did not give."""
    return type(optimizer).__name__ == "_MockOptimizer"


def untoggle_optimizers(module: pl.LightningModule) -> None:
    """Undo what ``toggle_optimizer`` did where an exception kept ``untoggle_optimizer`` from being called."""
    state: dict[Any, bool] = dict(module._param_requires_grad_state)  # its keys are parameters, not names
    for parameter, requires_grad in state.items():
        parameter.requires_grad = requires_grad
    module._param_requires_grad_state = {}


def configured_optimizers(module: pl.LightningModule) -> tuple[list[Optimizer], list[Any]]:
    """The optimizers and schedulers that a module configures."""
    from lightning.pytorch.core.optimizer import _configure_optimizers

    configured: Any = module.configure_optimizers()
    optimizers, schedulers, _ = _configure_optimizers(configured or [])
    return optimizers, [each["scheduler"] if isinstance(each, dict) else each for each in schedulers]


# ---- checkpoints

checkpoint_decisions = ("_save_topk_checkpoint", "_save_last_checkpoint", "_should_save_on_exception")
"""Where ``ModelCheckpoint`` decides on one file: what it writes, removes and remembers."""


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``Trainer.save_checkpoint`` would write."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


@contextmanager
def without_optimizers(strategy: ModelParallelStrategy, hidden: bool) -> Iterator[Sequence[Optimizer]]:
    """Let a strategy load a checkpoint that holds no optimizer state, where ``hidden``; gives the optimizers."""
    optimizers = strategy._optimizers
    if hidden:
        strategy._optimizers = []
    try:
        yield optimizers
    finally:
        strategy._optimizers = optimizers
