"""The steps of one optimizer: measured before the update, decided, acted on inside it, undone after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from stability_callbacks.callbacks._learning_rates import LearningRates
from stability_callbacks.callbacks._step_record import PendingRecord
from stability_callbacks.clipping import ClipResult
from stability_callbacks.gradient_pass import (
    GradientNorms,
    GradientPass,
    NamedParameters,
    measure_gradients,
    scale_gradients_,
)

if TYPE_CHECKING:
    from stability_callbacks.callbacks._lifecycle import StepLifecycle

__all__ = ["OptimizerStep"]


class OptimizerStep:
    """One optimizer's current step, and the hooks that reach into its ``step()``.

    A pre-hook of ``optimizer.step`` fires before the closure, so before forward and backward. It wraps the closure and
    acts when that returns; under a loss scaler ``step()`` is called without one and it acts directly.

    Attributes:
        optimizer: The optimizer.
        index: Its position among the trainer's optimizers.
        label: Its name in metrics, as ``LearningRateMonitor`` forms it.
        suffix: What metric names end in where there are several optimizers, else empty.
        parameters: Its trainable parameters with their names in the model.
        gradients: The gradients of the current step; None between steps.
        loss: The loss of the current step, 0-dim, unscaled; None where it was not seen. If a callback compares losses,
            the mean over all processes.
        loss_scale: The loss scale of the current step, 0-dim; None if there is no scaler.
        skip: The verdict on the device, 0-dim; None if nobody votes.
        skipped: The verdict where the host knows it, else None.
        clip_result: What clipping did in the current step, all rules together.
    """

    def __init__(self, lifecycle: StepLifecycle, optimizer: Optimizer, index: int, label: str, several: bool) -> None:
        self.lifecycle = lifecycle
        self.optimizer = optimizer
        self.index = index
        self.label = label
        self.suffix = f"/{label}" if several else ""
        self.rates = LearningRates(optimizer)
        self.gradients: GradientPass | None = None
        self.loss: Tensor | None = None
        self.loss_scale: Tensor | None = None
        self.skip: Tensor | None = None
        self.skipped: bool | None = None
        self.clip_result: ClipResult | None = None
        self.global_step = 0
        self.batch_idx = 0
        self._measured = False
        self._acted = False
        self._depth = 0
        self._owns_found_inf = False
        self._votes: list[tuple[str, Tensor]] = []
        self._watches: list[tuple[str, Tensor]] = []
        self._own_loss: Tensor | None = None
        self._found_here: Tensor | None = None
        self._flagged = False
        self._named: tuple[tuple[int, ...], NamedParameters] = ((), NamedParameters())
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    # ---- what callbacks may ask

    @property
    def parameters(self) -> NamedParameters:
        sizes = tuple(len(group["params"]) for group in self.optimizer.param_groups)
        if sizes != self._named[0]:
            self._named = (sizes, self._name_parameters())
        return self._named[1]

    @property
    def inverse_scale(self) -> Tensor | None:
        """One over the loss scale that the gradients still carry, 0-dim; None if they carry none."""
        return self.gradients.inverse_scale if self.gradients is not None else None

    def current_norms(self, norm_type: float = 2.0) -> GradientNorms:
        """Norms of the gradients as they are now: the raw ones while nobody has changed a gradient."""
        assert self.gradients is not None
        if not self.gradients.changed():
            return self.gradients.norms(norm_type)
        return measure_gradients(self.gradients.parameters, norm_type, self.inverse_scale)

    def mask_if_skipped(self, norms: GradientNorms) -> GradientNorms:
        """NaN in place of the norms of a step whose verdict is "skip" but not known to the host."""
        if self.skip is None or self.skipped is not None:
            return norms
        nan = torch.full_like(norms.total, float("nan"))
        return norms._replace(
            per_tensor=torch.where(self.skip, nan, norms.per_tensor), total=torch.where(self.skip, nan, norms.total)
        )

    def drop_loss_scale(self) -> None:
        """Divide the gradients by the loss scale that they still carry, for rules that need their true values."""
        if self.gradients is None or self.gradients.inverse_scale is None:
            return
        scale_gradients_(self.gradients.parameters, self.gradients.inverse_scale)
        self.gradients.inverse_scale = None
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    # ---- the life of a step

    @torch.no_grad()
    def measure(self, loss: Tensor | None, batch_idx: int) -> None:
        """Measure the gradients, let the callbacks observe and vote, and reach the verdict. Changes no gradient."""
        self.abandon()
        trainer = self.lifecycle.trainer
        self._measured = True
        self.global_step, self.batch_idx = trainer.global_step, batch_idx
        scale = _loss_scale(trainer.precision_plugin, trainer.strategy.root_device)
        self.loss = loss if loss is None or scale is None else loss / scale
        self._own_loss = self.loss
        if self.lifecycle.distributed and any(callback.compares_losses() for callback in self.lifecycle.callbacks):
            self.loss = self._mean_loss(self.loss)
        self.loss_scale = scale
        carries_scale = scale is not None and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self.gradients = GradientPass(
            self.parameters, scale.reciprocal() if scale is not None and carries_scale else None
        )
        if not self.gradients:
            return
        callbacks = self.lifecycle.callbacks
        for norm_type in {2.0}.union(*(callback.norm_types() for callback in callbacks)):
            self.gradients.norms(norm_type)
        for callback in callbacks:
            callback.observe(self)
        self._votes = [vote for callback in callbacks for vote in callback.vote(self)]
        self._watches = [watch for callback in callbacks for watch in callback.watch(self)]
        if self._votes or self._watches:
            self._decide()

    def _mean_loss(self, loss: Tensor | None) -> Tensor:
        """The mean of all processes' losses, NaN where one of them has none."""
        device = self.lifecycle.trainer.strategy.root_device
        mean = torch.full((), math.nan, device=device) if loss is None else loss.to(device, torch.float32, copy=True)
        torch.distributed.all_reduce(mean)
        return mean / self.lifecycle.trainer.world_size

    def _decide(self) -> None:
        flags = torch.stack([flag for _, flag in (*self._votes, *self._watches)])
        if self.lifecycle.distributed:
            self._found_here = flags[: len(self._votes)].any()
            reduced = flags.to(torch.int32)
            torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
            flags = reduced.bool()
        votes = len(self._votes)
        self._votes = [(kind, flag) for (kind, _), flag in zip(self._votes, flags[:votes], strict=True)]
        self._watches = [(kind, flag) for (kind, _), flag in zip(self._watches, flags[votes:], strict=True)]
        if not votes:
            return
        self.skip = flags[:votes].any()
        if not _obeys_found_inf(self.optimizer) or not self.lifecycle.buffers_restorable_on_device():
            known = flags.tolist()  # the one agreed read
            self.skipped, self._flagged = any(known[:votes]), any(known)
            self.lifecycle.note_wait(flags.device)
            if self.skipped:
                self.lifecycle.restore_buffers()

    @torch.no_grad()
    def act(self) -> None:
        """Carry the verdict out, right before the optimizer's arithmetic."""
        if not self._measured:
            self.lifecycle.note_unseen_step(self.optimizer)
            return
        if self._acted:
            return
        self._acted = True
        callbacks = self.lifecycle.callbacks
        applies = bool(self.gradients) and not self.skipped
        if self.gradients and self.skipped:
            for _, parameter in self.gradients.parameters:
                parameter.grad = None
        if self.skip is not None and self.skipped is None:
            self._set_found_inf(self.skip)
        for callback in callbacks if applies else ():
            callback.clip(self)
        self.scale_rates()
        for callback in callbacks:
            callback.before_update(self)
        for callback in callbacks if applies else ():
            callback.penalize(self)

    def scale_rates(self) -> None:
        """Put the multiplied learning rates in force."""
        factors = [
            multipliers
            for callback in self.lifecycle.callbacks
            if (multipliers := callback.rate_multipliers(self)) is not None
        ]
        if factors:
            products = [1.0] * len(self.optimizer.param_groups)
            for multipliers in factors:
                products = [product * multiplier for product, multiplier in zip(products, multipliers, strict=True)]
            self.rates.multiply(products)

    def finish_if_over(self) -> None:
        """Finish a step that Lightning has counted: its ``step()`` has returned, or a loss scaler left it out."""
        if self._measured and self.lifecycle.trainer.global_step > self.global_step:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Undo what was for this step only, restore buffers after a skip, and write the step's record."""
        lifecycle = self.lifecycle
        self._undo()
        for callback in lifecycle.callbacks:
            if self._acted:
                callback.after_update(self)
        lifecycle.close_window(self)
        if self.gradients:
            record = self._pending_record(self.gradients)
            for callback in lifecycle.callbacks:
                callback.note(self, record)
            lifecycle.record(record, self._flagged)
        for callback in lifecycle.callbacks:
            callback.on_step_attempted(self)
        if lifecycle.shows_rates(self):
            self.scale_rates()
        self._forget()

    def abandon(self) -> None:
        """Forget a step that an exception ended, and undo what was for this step only."""
        self._undo()
        self._forget()

    def close(self) -> None:
        """Let go of the optimizer."""
        self.abandon()
        self.rates.detach()
        for hook in self._hooks:
            hook.remove()

    # ---- inside optimizer.step

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if isinstance(closure, _ActingClosure):  # a subclass hands our closure on to `super().step(closure)`
            self._depth += 1
            return None
        if closure is None:
            self._depth += 1
            self.act()
            return None
        self._depth = 1
        acting = _ActingClosure(closure, self)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": acting}
        return (args[0], acting, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0 and self._acted:
            self.finish()

    def _set_found_inf(self, skip: Tensor) -> None:
        # The fused kernels take exactly 1.0 for "leave everything as it is".
        found_inf = skip.to(torch.float32)
        scalers = getattr(self.optimizer, "found_inf", None)
        if scalers is not None:
            found_inf = torch.maximum(found_inf, scalers.to(found_inf.device).clamp(max=1.0))
        self._owns_found_inf = scalers is None
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def _undo(self) -> None:
        if self._owns_found_inf:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
            self._owns_found_inf = False
        if not self.lifecycle.shows_rates(self):
            self.rates.restore()

    def _forget(self) -> None:
        self.gradients = self.loss = self.loss_scale = self.skip = self.skipped = self.clip_result = None
        self._votes, self._watches, self._own_loss, self._found_here = [], [], None, None
        self._flagged = self._measured = self._acted = False

    def _pending_record(self, gradients: GradientPass) -> PendingRecord:
        norm = gradients.norms().total
        clip = self.clip_result or ClipResult(norm, norm, torch.ones_like(norm))
        unknown = torch.full_like(norm, float("nan"))
        loss = unknown if self.loss is None else self.loss
        scale = unknown if self.loss_scale is None else self.loss_scale
        own_loss = unknown if self._own_loss is None else self._own_loss
        # What is found is found here where there is one process.
        found_here = next((each for each in (self._found_here, self.skip) if each is not None), unknown)
        flags = [flag for _, flag in (*self._votes, *self._watches)]
        numbers = [loss, norm, clip.clipped_norm, clip.coefficient, *flags, scale, own_loss, found_here]
        return PendingRecord(
            self.label,
            self.global_step,
            self.lifecycle.trainer.current_epoch,
            self.batch_idx,
            vote_kinds=tuple(kind for kind, _ in self._votes),
            watch_kinds=tuple(kind for kind, _ in self._watches),
            values=torch.stack([number.to(norm.device, torch.float32) for number in numbers]),
        )

    def _name_parameters(self) -> NamedParameters:
        names = {id(parameter): name for name, parameter in self.lifecycle.named_parameters}
        return NamedParameters(
            (names.get(id(parameter), f"{self.label}.group{group_index}.{position}"), parameter)
            for group_index, group in enumerate(self.optimizer.param_groups)
            for position, parameter in enumerate(group["params"])
        )


class _ActingClosure:
    """An optimizer's closure that acts on the step once forward and backward are through."""

    def __init__(self, closure: Callable[[], Any], step: OptimizerStep) -> None:
        self._closure = closure
        self._step = step
        self._called = False

    def __call__(self) -> Any:
        if self._called:
            raise several_closures(self._step.optimizer)
        self._called = True
        result = self._closure()
        self._step.act()
        return result


def several_closures(optimizer: Optimizer) -> MisconfigurationException:
    """The error about an optimizer that evaluates its closure more than once in a step."""
    return MisconfigurationException(
        f"The stability callbacks do not work with {type(optimizer).__name__}: it evaluates the loss several times in "
        "a step, so there is no one set of gradients to judge. Use a first-order optimizer, or remove the callbacks."
    )


def _loss_scale(precision_plugin: Any, device: torch.device) -> Tensor | None:
    """The loss scale in force, 0-dim on the given device, without waiting for it; None if there is no scaler."""
    scaler = getattr(precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def _obeys_found_inf(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves everything as it is where ``found_inf`` is 1, so that the host need not know.

    True of torch's fused kernels once their state exists: fused SGD leaves a new momentum buffer uninitialised.
    """
    if type(optimizer) not in (SGD, Adagrad, Adam, AdamW) or not all(g.get("fused") for g in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        needs_state = type(optimizer) is not SGD or group["momentum"] != 0
        for parameter in group["params"]:
            if parameter.grad is not None and (
                isinstance(parameter, DTensor) or (needs_state and not optimizer.state.get(parameter))
            ):
                return False
    return True


def optimizer_labels(optimizers: Sequence[Optimizer]) -> list[str]:
    """Names of optimizers as ``LearningRateMonitor`` forms them: the class, and a number from the second of a class on.

    Example:
        >>> weight = [torch.nn.Parameter(torch.zeros(1))]
        >>> optimizer_labels([torch.optim.Adam(weight), torch.optim.SGD(weight), torch.optim.Adam(weight)])
        ['Adam', 'SGD', 'Adam-1']
    """
    labels: list[str] = []
    seen: dict[str, int] = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        labels.append(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return labels
