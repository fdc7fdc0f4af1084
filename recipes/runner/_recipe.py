"""A recipe: one failure, trained plain and healed, from the same seed, on the same data."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path, PosixPath, WindowsPath
from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor
from torch.serialization import safe_globals

from recipes.data import Poison, poison_batches
from recipes.results import Goal, HistoryLogger, Run, Variant
from recipes.runner._callback_set import CallbackSet
from recipes.runner._interruption import InterruptCheckpoint, Interrupted, Interruption
from recipes.runner._progress import StepProgressBar
from stability_callbacks import StepGuard, TrainingDivergedError
from stability_callbacks._atomic import atomic_path, remove_leftovers

__all__ = ["ModelFactory", "Recipe", "TrainerFactory"]

ModelFactory = Callable[[torch.Size, int, OptimizerCallable], L.LightningModule]
"""Makes the model from the shape of one input, the number of outputs and what makes the optimizer."""

SETTINGS = "config.yaml"
FINISHED = "run.json"
INTERRUPTED = "interrupted.ckpt"
HISTORY = "interrupted.json"
PATHS: list[Any] = [Path, PosixPath, WindowsPath]


class TrainerFactory(Protocol):
    """Makes a Trainer with every option set except the callbacks and loggers, which each run brings along."""

    def __call__(self, *, callbacks: list[Callback], logger: list[Logger]) -> L.Trainer: ...


@runtime_checkable
class _Seeded(Protocol):
    seed: int


class Recipe:
    """Train a plain model and a healed one from the same seed, and compare them.

    Args:
        scenario: Which failure to show, or "all".
        variant: Train without the cure, with it, or both.
        seed: Seed of the weights, the order of the batches and the poison.
        seeds: Repeat with this many seeds, from --seed on, and compare in pairs.
        ablate: Also train the healed variant without each of its callbacks in turn.
        resume: Go on where an interrupted run of the same command stopped.
        split: Evaluate on the test split, or on the validation split while you choose settings.
        output: Folder for the results, pictures and TensorBoard logs.
        threads: CPU threads; more than one seldom pays for models this small.
        model: The model of both variants.
        optimizer: Optimizer of both variants.
        data: Data module of both variants, of any class. Its batches must be pairs of inputs and targets; the number of
            outputs is its attribute "classes", or one more than the largest target.
        trainer: Trainer of both variants; takes every argument of lightning.Trainer but callbacks and logger.
        goal: What counts as success.
        poison: Which training batches are bad; null leaves all of them clean.
        faults: Callbacks of both variants that do harm, such as FaultInjector.
        plain: Callbacks of the plain variant: they only watch.
        healed: Callbacks of the healed variant: the cure.
    """

    def __init__(
        self,
        *,
        scenario: str,
        variant: Literal["plain", "healed", "both"],
        seed: NonNegativeInt,
        seeds: PositiveInt,
        ablate: bool,
        resume: bool,
        split: Literal["test", "val"],
        output: Path,
        threads: PositiveInt,
        model: ModelFactory,
        optimizer: OptimizerCallable,
        data: L.LightningDataModule,
        trainer: TrainerFactory,
        goal: Goal,
        poison: Poison | None,
        faults: list[Callback],
        plain: CallbackSet,
        healed: CallbackSet,
    ) -> None:
        self.scenario = scenario
        self.variants: tuple[Variant, ...] = ("plain", "healed") if variant == "both" else (variant,)
        self.seeds = range(seed, seed + seeds)
        self.ablate = ablate
        self.resume = resume
        self.split = split
        self.output = output
        self.threads = threads
        self.make_model = model
        self.optimizer = optimizer
        self.data = data
        self.make_trainer = trainer
        self.goal = goal
        self.poison = poison
        self.faults = faults
        self.callbacks: dict[Variant, CallbackSet] = {"plain": plain, "healed": healed}
        self.settings = ""
        self.output.mkdir(parents=True, exist_ok=True)

    def rehearse(self) -> None:
        """Make everything once for nothing, so that what is wrong is told now and not after an hour of training.

        Raises:
            TypeError, ValueError, OSError, MisconfigurationException: If the settings do not work.
        """
        asked, history = Interruption(), HistoryLogger()
        trainer = self._trainer([InterruptCheckpoint(self.output / INTERRUPTED, asked, history)], [history])
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "`trainer.strategy` must not start processes that keep their results to themselves: take ddp, not "
                f"{trainer.strategy.launcher.__class__.__name__.strip('_')}'s"
            )
        _replace_progress_bar(trainer, StepProgressBar("", Console(quiet=True)))
        model = self.make_model(*self._dimensions, self.optimizer)
        self.optimizer(model.parameters())
        if trainer.world_size == 1:
            for limit in ("limit_test_batches", "limit_val_batches"):
                setattr(trainer, limit, 1 if getattr(trainer, limit) else 0)
            self._evaluate(trainer, model, self._fresh_data(self.seeds[0]))

    def record(self, settings: str) -> None:
        """Keep ``settings`` beside each run, so that it can be made again, and resumed only by the same command.

        Raises:
            ValueError: If this recipe is to resume runs that were made with other settings.
        """
        self.settings = settings
        for path in sorted(self.output.glob(f"{self.scenario}-*/seed-*/{SETTINGS}")) if self.resume else ():
            if path.read_text() != settings:
                raise ValueError(f"`resume` goes on with the same settings, but {path} has others; run without it")
            if (finished := path.with_name(FINISHED)).exists():
                Run.load(finished)  # damage is told now, too

    def run(self, console: Console, asked: Interruption) -> Iterator[Run]:
        """Train every run of the scenario, one after the other.

        Raises:
            Interrupted: If the user asked to stop; the run under way has left a checkpoint.
        """
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)  # the denormal gradients of a ruined LSTM cost a CPU five times the time
        for seed, variant in product(self.seeds, self.variants):
            yield self._train(variant, self.callbacks[variant], None, seed, console, asked)
        if self.ablate:
            for (name, callbacks), seed in product(self.callbacks["healed"].ablations().items(), self.seeds):
                yield self._train("healed", callbacks, name, seed, console, asked)

    def _train(
        self,
        variant: Variant,
        callback_set: CallbackSet,
        without: str | None,
        seed: int,
        console: Console,
        asked: Interruption,
    ) -> Run:
        """Train one model and evaluate it, or take what an earlier command left of it."""
        if asked.requested:
            raise Interrupted
        blank = Run(self.scenario, variant, seed, self.goal, 0.0, 0, 0.0, {}, without=without)
        folder = self.output / blank.name / f"seed-{seed}"
        # Without --resume nothing that lies there counts, not even while another process has yet to clear it away.
        left = self.resume and folder.exists()
        if not left:
            self._clear(folder)
        if left and (folder / FINISHED).exists():
            return Run.load(folder / FINISHED)
        if left and not (folder / INTERRUPTED).exists():  # what stopped without a checkpoint begins anew
            self._clear(folder)

        data, dimensions = self._fresh_data(seed), self._dimensions
        L.seed_everything(seed, verbose=False)  # last before the model: to look at the data may draw random numbers
        model = self.make_model(*dimensions, self.optimizer)
        history, callbacks = HistoryLogger(), callback_set.fresh()
        checkpoint = InterruptCheckpoint(folder / INTERRUPTED, asked, history)
        resumed = left and checkpoint.path.exists()
        if resumed and (folder / HISTORY).exists():
            history.read(folder / HISTORY)
        trainer = self._trainer(
            [*copy.deepcopy(self.faults), *callbacks, checkpoint],
            [TensorBoardLogger(self.output, name=blank.name, version=folder.name), history],
        )
        title = f"{self.scenario:>10} · {variant if without is None else f'no {without}':<6}"
        _replace_progress_bar(trainer, StepProgressBar(f"{title} · {seed}", console))

        stopped = None
        try:
            with safe_globals(PATHS):  # which Lightning's checkpoints hold as hyper-parameters
                trainer.fit(model, data, ckpt_path=checkpoint.path if resumed else None, weights_only=resumed or None)
        except TrainingDivergedError as error:
            stopped = str(error)
        if checkpoint.stopped:
            rank_zero_only(history.write)(folder / HISTORY)
            raise Interrupted
        if self.poison and not any(self.poison.hits(step, seed) for step in range(trainer.global_step)):
            console.print("[yellow]No batch was poisoned in so short a run: raise --trainer.max_steps.")
        run = replace(
            blank,
            value=self._evaluate(trainer, model, data),
            skipped_steps=sum(callback.skipped_steps for callback in callbacks if isinstance(callback, StepGuard)),
            seconds=checkpoint.elapsed,
            history=history.history,
            stopped=stopped,
        )
        rank_zero_only(run.save)(folder / FINISHED)
        trainer.strategy.remove_checkpoint(checkpoint.path)
        rank_zero_only((folder / HISTORY).unlink)(missing_ok=True)
        return run

    def _trainer(self, callbacks: list[Callback], logger: list[Logger]) -> L.Trainer:
        # Copied: a strategy, for one, serves a single Trainer.
        return copy.deepcopy(self.make_trainer)(callbacks=callbacks, logger=logger)

    def _evaluate(self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> float:
        evaluate = trainer.test if self.split == "test" else trainer.validate
        scores = evaluate(model, data, verbose=False)
        name = f"{self.split}/{self.goal.metric}"
        if len(scores) != 1 or name not in scores[0]:
            logged = ", ".join(sorted({key for score in scores for key in score})) or "nothing"
            raise ValueError(f"`goal.metric` is '{self.goal.metric}', but the evaluation gave {logged}")
        return float(scores[0][name])

    @cached_property
    def _dimensions(self) -> tuple[torch.Size, int]:
        data = copy.deepcopy(self.data)
        data.trainer = self._trainer([], [])
        return _dimensions(data)

    def _fresh_data(self, seed: int) -> L.LightningDataModule:
        data = copy.deepcopy(self.data)
        if isinstance(data, _Seeded):
            data.seed = seed
        if self.poison is not None:
            poison_batches(data, self.poison, seed)
        return data

    @rank_zero_only
    def _clear(self, folder: Path) -> None:
        """Remove what recipes and TensorBoard left in the folder, and nothing else."""
        for pattern in (SETTINGS, FINISHED, HISTORY, "events.out.tfevents.*", "hparams.yaml"):
            for path in folder.glob(pattern):
                path.unlink()
        shutil.rmtree(folder / INTERRUPTED, ignore_errors=True)  # a sharded checkpoint is a folder
        (folder / INTERRUPTED).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with atomic_path(folder / SETTINGS) as part:
            part.write_text(self.settings)


def _dimensions(data: L.LightningDataModule) -> tuple[torch.Size, int]:
    """Return the shape of one input, and the number of outputs that its targets ask for."""
    rank_zero_only(data.prepare_data)()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError(f"`data` must give batches that are pairs of tensors (inputs, targets), got {_form(batch)}")
    inputs, targets = batch
    classes = getattr(data, "classes", None)
    if classes is None and targets.is_floating_point():
        classes = targets.shape[1] if targets.ndim > 1 else 1
    if classes is None:
        classes = max(int(targets.max()) for _, targets in loader) + 1
    return inputs.shape[1:], int(classes)


def _form(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}[{', '.join(type(part).__name__ for part in batch)}]"
    return type(batch).__name__


def _replace_progress_bar(trainer: Any, bar: StepProgressBar) -> None:
    # Only where Lightning put one, so that `--trainer.enable_progress_bar false` still has its meaning.
    if trainer.progress_bar_callback is not None:
        trainer.callbacks[trainer.callbacks.index(trainer.progress_bar_callback)] = bar
