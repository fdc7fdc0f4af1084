"""A training step outside of the training loop: its loss, and nothing else of what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from stability_callbacks.engine._lightning import attached_trainer, both, configured_optimizers

__all__ = ["detached_from_trainer", "loss_of"]


def loss_of(module: nn.Module, batch: Any, batch_idx: int) -> Tensor | None:
    """Run a module's training step as Lightning would, and give what Lightning would send backward.

    The step runs :func:`detached_from_trainer`; what else it changes (buffers, random states, attributes of the module)
    is for :func:`~stability_callbacks.diagnosis.isolated` to put back.

    Args:
        module: A ``LightningModule``, or another module with a ``training_step``, attached to a trainer or not.
        batch: The micro-batch, on the module's device.
        batch_idx: Its index, for a step that takes one.

    Returns:
        The loss, with its graph: the step's tensor, or the ``"loss"`` in its dict. In manual optimization the sum of
        all that it gave to ``manual_backward``. None if there is none.

    Raises:
        TypeError: If the module has no ``training_step``, or one that takes an iterator or gives something else.

    Example:
        >>> import torch
        >>> class Model(pl.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         self.log("train_loss", batch.mean())  # would raise without a trainer
        ...         return {"loss": batch.mean(), "batch_idx": batch_idx}
        >>> loss_of(Model(), torch.tensor([1.0, 3.0]), 0)
        tensor(2.)
    """
    step = getattr(module, "training_step", None)
    step = getattr(step, "unguarded", step)  # see `StepErrors`
    if step is None:
        raise TypeError(f"`module` must have a training_step, got a {type(module).__name__}, which has none")
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise TypeError(
            f"{type(module).__name__}.training_step takes its batches from an iterator (`dataloader_iter`), so it "
            "can't be given one again: let it take `batch`."
        )
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with detached_from_trainer(module) as sent_backward:
        output = step(batch, batch_idx) if takes_index else step(batch)
    if not getattr(module, "automatic_optimization", True):
        return sum(sent_backward[1:], sent_backward[0]) if sent_backward else None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is not None and not isinstance(loss, Tensor):
        raise TypeError(
            f"{type(module).__name__}.training_step must give a tensor, a dict with one as 'loss', or None, "
            f"got {type(loss).__name__}"
        )
    return loss


@contextmanager
def detached_from_trainer(module: nn.Module) -> Iterator[list[Tensor]]:
    """Let a training step run without an effect on training: nothing logged, no gradient, no optimizer step.

    In the module and the ``LightningModule`` inside of it, ``log``, ``log_dict``, ``print``, ``toggle_optimizer``,
    ``untoggle_optimizer`` and ``clip_gradients`` do nothing; ``manual_backward`` keeps the loss; ``optimizers()`` and
    ``lr_schedulers()`` give copies that show the same hyper-parameters, and whose ``step`` and ``zero_grad`` do nothing
    (a closure is called, as the step may send its loss backward there). The trainer, if there is one, stays readable;
    its loggers take everything and keep nothing. Without one, ``optimizers()`` asks ``configure_optimizers``. All is
    put back afterwards, also after an exception. Contexts may be nested.

    Args:
        module: The module. One that is not, and does not hold, a ``LightningModule`` is left as it is.

    Yields:
        A list, to which each loss given to ``manual_backward`` is appended.

    Example:
        >>> import torch
        >>> model = pl.LightningModule()
        >>> with detached_from_trainer(model) as sent_backward:
        ...     model.manual_backward(torch.ones(()))
        >>> sent_backward
        [tensor(1.)]
    """
    sent_backward: list[Tensor] = []
    lightning_modules = [each for each in module.modules() if isinstance(each, both(pl.LightningModule))]
    with ExitStack() as put_back:
        if lightning_modules:
            outer = lightning_modules[0]
            stand_ins = _stand_ins(outer, sent_backward)
            for each in lightning_modules:
                put_back.enter_context(_shadowed(each, stand_ins))
            if isinstance(trainer := attached_trainer(outer), both(pl.Trainer)):
                put_back.enter_context(_silenced(trainer))
        yield sent_backward


def _stand_ins(module: pl.LightningModule, sent_backward: list[Tensor]) -> dict[str, Callable[..., Any]]:
    @cache
    def inert() -> tuple[list[_InertOptimizer], list[Any]]:
        optimizers, schedulers = _optimizers_and_schedulers(module)
        return [_InertOptimizer(optimizer) for optimizer in optimizers], [_inert(each) for each in schedulers]

    def optimizers(use_pl_optimizer: bool = True) -> Any:
        return _one_or_all(inert()[0])

    def lr_schedulers() -> Any:
        return _one_or_all(inert()[1]) or None

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        sent_backward.append(loss)

    nothing = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    return {
        **dict.fromkeys(nothing, _do_nothing),
        "toggled_optimizer": _nothing_meanwhile,
        "optimizers": optimizers,
        "lr_schedulers": lr_schedulers,
        "manual_backward": manual_backward,
    }


class _InertOptimizer(Optimizer):
    """Shows another optimizer's state and copies of its hyper-parameters, and does nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [
            {name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items()}
            for group in optimizer.param_groups
        ]
        super().__init__(groups, dict(optimizer.defaults))
        self.state.update(optimizer.state)

    @property
    def optimizer(self) -> _InertOptimizer:
        """Lightning's optimizers give the one that they wrap."""
        return self

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def toggle_model(self, sync_grad: bool = True) -> Any:
        return _nothing_meanwhile()


def _inert(scheduler: Any) -> Any:
    """A copy, of the same class since users ask for it, that does not step."""
    scheduler = copy.copy(scheduler)
    scheduler.step = _do_nothing
    return scheduler


def _optimizers_and_schedulers(module: pl.LightningModule) -> tuple[list[Optimizer], list[Any]]:
    if isinstance(attached_trainer(module), both(pl.Trainer)):
        return module.trainer.optimizers, [config.scheduler for config in module.trainer.lr_scheduler_configs]
    return configured_optimizers(module)


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _nothing_meanwhile(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


@contextmanager
def _shadowed(module: pl.LightningModule, stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Let attributes of the instance hide methods of its class."""
    attributes = vars(module)
    before = {name: attributes[name] for name in stand_ins if name in attributes}
    attributes.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            attributes.pop(name, None)
        attributes.update(before)


@contextmanager
def _silenced(trainer: pl.Trainer) -> Iterator[None]:
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
