"""One optimizer and the step that it is about to make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from stability_callbacks._identity import same_objects
from stability_callbacks._optimizers import parameters_of
from stability_callbacks.clipping import ClipResult
from stability_callbacks.engine._learning_rates import LearningRates
from stability_callbacks.engine._records import PendingRecord
from stability_callbacks.engine._verdict import Verdict
from stability_callbacks.gradient_pass import (
    GradientNorms,
    GradientPass,
    NamedParameters,
    measure_gradients,
    scale_gradients_,
)

__all__ = ["OptimizerStep", "optimizer_labels"]


class OptimizerStep:
    """One optimizer's current step, as callbacks may look at it and act on it.

    Args:
        optimizer: The optimizer.
        index: Its position among the trainer's optimizers.
        label: Its name in metrics, as ``LearningRateMonitor`` forms it.
        several: Whether there are other optimizers.
        names: Gives the model's parameters with their names.

    Attributes:
        optimizer: The optimizer.
        index: Its position among the trainer's optimizers.
        label: Its name in metrics.
        suffix: What metric names end in where there are several optimizers, else empty.
        rates: Its learning rates.
        written_entries: The keys of its parameter groups, and the names of attributes, that its arithmetic was seen to
            write; they belong to its state.
        gradients: The gradients of the current step; None between steps.
        loss: The loss of the current step, 0-dim, unscaled; None where it was not seen. If a callback compares losses,
            the mean over all processes.
        own_loss: The loss of this process.
        loss_scale: The loss scale of the current step, 0-dim; None if there is no scaler.
        verdict: What was found about the current step.
        clip_result: What clipping did in the current step, all rules together.
        global_step: ``trainer.global_step`` when the current step was measured.
        batch_idx: The batch that completed it.
        measured: Whether there is a current step.
        acted: Whether its verdict has been acted on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        index: int,
        label: str,
        several: bool,
        names: Callable[[], Sequence[tuple[str, Tensor]]],
    ) -> None:
        self.optimizer = optimizer
        self.index = index
        self.label = label
        self.suffix = f"/{label}" if several else ""
        self.rates = LearningRates(optimizer)
        self.written_entries: set[str] = set()
        self._names = names
        self._named: tuple[list[Tensor], NamedParameters] = ([], NamedParameters())
        self._seen = parameters_of(self.optimizer)
        self.global_step = self.batch_idx = 0
        self.forget()

    def forget(self) -> None:
        """There is no current step."""
        self.gradients: GradientPass | None = None
        self.loss: Tensor | None = None
        self.own_loss: Tensor | None = None
        self.loss_scale: Tensor | None = None
        self.clip_result: ClipResult | None = None
        self.verdict = Verdict()
        self.measured = self.acted = False

    @property
    def parameters(self) -> NamedParameters:
        """Its parameters as they are now, with their names in the model."""
        if not self._holds():
            self._named = (parameters_of(self.optimizer), self._name_parameters())
        return self._named[1]

    def parameters_changed(self) -> bool:
        """Whether it has other parameters than at the last call of this, or at first."""
        members, known = parameters_of(self.optimizer), self._seen
        self._seen = members
        return not same_objects(members, known)

    @property
    def skip(self) -> Tensor | None:
        """The verdict on the device, 0-dim; None if nobody votes."""
        return self.verdict.skip

    @property
    def skipped(self) -> bool | None:
        """The verdict where the host knows it, else None."""
        return self.verdict.skipped

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

    def pending_record(self, epoch: int) -> PendingRecord:
        """The record of the current step, on the device; there must be gradients."""
        assert self.gradients is not None
        norm = self.gradients.norms().total
        clip = self.clip_result or ClipResult(norm, norm, torch.ones_like(norm))
        unknown = torch.full_like(norm, float("nan"))
        verdict = self.verdict
        # What is found is found here where there is one process.
        found_here = next((each for each in (verdict.found_here, verdict.skip) if each is not None), unknown)
        numbers = [
            unknown if self.loss is None else self.loss,
            norm,
            clip.clipped_norm,
            clip.coefficient,
            *(flag for _, flag in (*verdict.votes, *verdict.watches)),
            unknown if self.loss_scale is None else self.loss_scale,
            unknown if self.own_loss is None else self.own_loss,
            found_here,
        ]
        return PendingRecord(
            self.label,
            self.global_step,
            epoch,
            self.batch_idx,
            vote_kinds=tuple(kind for kind, _ in verdict.votes),
            watch_kinds=tuple(kind for kind, _ in verdict.watches),
            values=torch.stack([number.to(norm.device, torch.float32) for number in numbers]),
        )

    def _holds(self) -> bool:
        return same_objects(parameters_of(self.optimizer), self._named[0])

    def _name_parameters(self) -> NamedParameters:
        names = {id(parameter): name for name, parameter in self._names()}
        return NamedParameters(
            (names.get(id(parameter), f"{self.label}.group{group_index}.{position}"), parameter)
            for group_index, group in enumerate(self.optimizer.param_groups)
            for position, parameter in enumerate(group["params"])
        )


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
