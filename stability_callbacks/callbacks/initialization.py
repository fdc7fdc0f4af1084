"""Initialize the weights at the start of a fresh run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import takewhile
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from torch import Tensor

from stability_callbacks._validation import check_bool, check_instance
from stability_callbacks.diagnosis import Failure, can_run_in_fork, run_in_fork, run_on_copy
from stability_callbacks.engine import loss_of
from stability_callbacks.engine._lightning import (
    Callback,
    MisconfigurationException,
    both,
    callbacks_of,
    drawn_batch,
    prepared_batch,
    training_loaders,
)
from stability_callbacks.initialization import Auto, InitReport, Policy, SignalReport, signal_report

__all__ = ["Initialization"]

# A plain attribute, so that it goes along with copies and pickles of the model but not into its state_dict.
_MARK = "_fitted_with_stability_callbacks"


class Initialization(Callback):
    """Initialize a model's weights by a policy before training starts, on a fresh run only.

    Use it when signals or gradients die or explode from the first step: in deep networks without norms, in
    recurrent ones over long sequences.

    It acts in ``on_fit_start``, when the layers exist that ``configure_model`` builds, and only if

    - no checkpoint is being resumed (``trainer.ckpt_path``),
    - this trainer has not trained yet (``global_step`` and ``current_epoch`` are 0),
    - and the model has not been fitted with this callback before: it then bears a mark, as do its copies and pickles.

    .. warning::
        A model from ``load_from_checkpoint``, or one whose pretrained weights you loaded yourself, bears no mark:
        nothing tells its weights from random ones, and they would be overwritten. Do not use this callback then. To
        initialize just a new head, freeze the rest (``requires_grad_(False)``), or name the head with
        :class:`~stability_callbacks.initialization.ByPattern`.

    The random state of training (torch, CUDA, NumPy, Python) stays as it was, yet the weights are reproducible under
    ``seed_everything``: their seed is drawn from a copy of that state, and is that of rank 0 everywhere, so all
    processes have the same weights, under DDP and FSDP2 (``ModelParallelStrategy``). Learning-rate and batch-size
    finders see the initialized model: this callback goes before them, wherever it stands in the list.

    A policy that looks at data (:class:`~stability_callbacks.initialization.LSUV`) gets the first training batch of
    rank 0, and needs a ``forward`` that takes the batch's first element; a loader that can be iterated only once loses
    that batch.

    With ``check=True`` the initialized model is tried out on that batch, through ``training_step``: where activations
    or gradients die or explode, a warning says in which layers, and what helps
    (:func:`~stability_callbacks.initialization.signal_report`). It takes place in a copy of the process, which draws a
    batch of its own: training afterwards is the same, bit for bit, as without it, whatever ``training_step`` does. On
    an accelerator, or a system other than Linux, it is a deep copy of the model, which does not isolate globals. A
    check that fails does not stop training, but warns. Modules with manual optimization, which make backward passes of
    their own, and sharded ones are not checked.

    Args:
        policy: What to write into which parameter. None (default): :class:`~stability_callbacks.initialization.Auto`.
        verbose: Whether to print what was done to each parameter, and the table of the check. Default True.
        check: Whether to check how the signal goes through the initialized model. Default False.

    Attributes:
        report: What was done to each parameter; None while nothing was.
        signal_report: What the check saw; None if there was none.

    Raises:
        TypeError: If ``policy`` is not a policy, or ``verbose`` or ``check`` not a boolean. At fit start:
            ``MisconfigurationException`` with FSDP1 or DeepSpeed, which keep copies of the weights out of reach; and
            what the policy raises.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from stability_callbacks import Initialization
        >>> from stability_callbacks.initialization import Recurrent
        >>> trainer = Trainer(callbacks=[Initialization(Recurrent(forget_bias=1.0))], logger=False)
    """

    report: InitReport | None
    signal_report: SignalReport | None

    def __init__(self, policy: Policy | None = None, verbose: bool = True, check: bool = False) -> None:
        allowed = "an initialization policy such as Auto()"
        self.policy = Auto() if policy is None else check_instance("policy", policy, Policy, allowed)  # type: ignore[type-abstract]
        self.verbose = check_bool("verbose", verbose)
        self.check = check_bool("check", check)
        self.report = None
        self.signal_report = None
        self._model_is_new: bool | None = None
        self._seed: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Read here, since another `Initialization` in the list may set the mark in its `on_fit_start`.
        self._model_is_new = not _is_marked(pl_module)
        callbacks = callbacks_of(trainer)
        if any(isinstance(each, (*both(LearningRateFinder), *both(BatchSizeFinder))) for each in callbacks):
            # They act in `on_fit_start`, too, and Lightning puts them first. A new list: this one is being iterated.
            first = sorted(callbacks, key=lambda callback: not isinstance(callback, Initialization))
            trainer.callbacks = first  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._seed is None:
            # For all of them before one sets up the data, which draws random numbers: a check must not change weights.
            seed = _drawn_seed()
            for callback in callbacks_of(trainer):
                if isinstance(callback, Initialization):
                    callback._seed = seed
        is_new, self._model_is_new = self._model_is_new, None
        if is_new is None:
            is_new = not _is_marked(pl_module)
        if is_new and trainer.ckpt_path is None and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._initialize(trainer, pl_module)
        else:
            rank_zero_info("Initialization leaves the weights as they are: this is not their first run.")
        setattr(pl_module, _MARK, True)
        self._seed = None

    def _initialize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, (*both(FSDPStrategy), *both(DeepSpeedStrategy))):
            raise MisconfigurationException(
                f"`Initialization` does not work with {type(trainer.strategy).__name__}, which keeps copies of the"
                " weights: use `ModelParallelStrategy` with `fully_shard`, or call `policy.apply(...)` on your layers"
                " where they are built."
            )
        checks = self.check and _can_be_checked(pl_module)
        if self.policy.needs_batch or checks:
            # As training itself does a moment later: what this draws must come from the state of training.
            trainer.fit_loop.setup_data()
        with isolate_rng():
            # Two of these callbacks must not draw the same numbers for different layers.
            assert self._seed is not None
            seed = trainer.strategy.broadcast(self._seed) + self._position(trainer)
            torch.default_generator.manual_seed(seed)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(seed)
            batch = _first_batch(trainer) if self.policy.needs_batch else None
            self.report = self.policy.apply(pl_module, batch)
            self.signal_report = _check(trainer, pl_module, batch) if checks else None
        if self.verbose and trainer.is_global_zero:
            console = Console()
            for report in filter(None, (self.report, self.signal_report)):
                console.print(report)
        if self.signal_report is not None and self.signal_report.findings:
            findings = "\n".join(f"- {finding}" for finding in self.signal_report.findings)
            rank_zero_warn(f"The initialized model is not healthy:\n{findings}")

    def _position(self, trainer: pl.Trainer) -> int:
        """How many callbacks of this class stand before this one."""
        before = takewhile(lambda callback: callback is not self, callbacks_of(trainer))
        return sum(isinstance(callback, Initialization) for callback in before)


def _drawn_seed() -> int:
    with isolate_rng():
        return int(torch.randint(2**62, ()))


def _first_batch(trainer: pl.Trainer) -> Any:
    """The first training batch of rank 0, on this process's device; training then starts with loaders as new."""
    loaders = training_loaders(trainer)
    if not loaders:
        raise MisconfigurationException(
            "`Initialization` needs a training batch, got none: is `limit_train_batches` 0?"
        )
    generators = {id(each): each for each in _generators(loaders)}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    batch = drawn_batch(trainer)
    for generator, state in states:
        generator.set_state(state)
    return prepared_batch(trainer, batch)


def _generators(loaders: Iterable[Any]) -> Iterator[torch.Generator]:
    """The generators that loaders and their samplers draw from, other than the global one."""
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator


def _can_be_checked(pl_module: pl.LightningModule) -> bool:
    if not pl_module.automatic_optimization:
        rank_zero_warn(
            "`Initialization(check=True)` does not support manual optimization: the model was initialized but not"
            " checked. Call `signal_report(model, batch, loss_fn)` with a loss of your own instead."
        )
    return pl_module.automatic_optimization


def _check(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> SignalReport | None:
    """Try the model out on a batch; on the first one if None is given."""

    def loss_fn(model: pl.LightningModule, batch: Any) -> Tensor | None:
        with trainer.precision_plugin.train_step_context():
            return loss_of(model, batch, 0)

    if trainer.world_size > 1 and batch is None:
        batch = _first_batch(trainer)  # all processes get that of rank 0

    if can_run_in_fork(pl_module, batch):
        report = run_in_fork(
            lambda: signal_report(pl_module, _first_batch(trainer) if batch is None else batch, loss_fn)
        )
    else:
        batch = _first_batch(trainer) if batch is None else batch
        report = run_on_copy(partial(signal_report, loss_fn=loss_fn), pl_module, batch, shared=[trainer])
    if not isinstance(report, Failure):
        return report
    rank_zero_warn(
        f"`Initialization(check=True)` could not check the model, which was initialized all the same: {report.reason}"
    )
    return None


def _is_marked(pl_module: pl.LightningModule) -> bool:
    return getattr(pl_module, _MARK, False)
