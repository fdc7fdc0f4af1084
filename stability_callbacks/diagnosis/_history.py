"""The last steps at full resolution, kept on the device until something happens."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stability_callbacks._validation import check_choice, check_integer, check_number
from stability_callbacks.diagnosis._history_csv import StepRow, write_history
from stability_callbacks.diagnosis._history_plot import plot_history
from stability_callbacks.gradient_pass import group_norms

__all__ = ["StepHistory"]

_NUMBERS = 4  # loss, raw norm, clipped norm, coefficient


class StepHistory:
    """A ring of one optimizer's last steps, with the norm of every gradient, that never makes the host wait.

    Use it when a step's numbers may be wanted later, and mostly are not. Adding a step is two small copies on
    the device, to storage that is allocated once and grows only when there are more gradients than in any step before.
    The values come to the host when they are asked for, all in one transfer.

    Args:
        history: Number of steps kept, >= 1. Default 256.
        norm_type: The ``p`` of the norms, to derive those of layers from those of parameters. Default 2.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> history = StepHistory(history=2)
        >>> numbers = torch.tensor([0.5, 5.0, 1.0, 0.25, 0.0])  # loss, norm, clipped norm, coefficient, one vote
        >>> for step in range(3):
        ...     history.add(step, ("net.weight", "net.bias"), torch.tensor([3.0, 4.0]), numbers, kinds=("spike",))
        >>> [(row.step, row.loss, row.verdict) for row in history.rows()]
        [(1, 0.5, ()), (2, 0.5, ())]
        >>> history.rows(per="layer")[-1].norms
        {'net': 5.0}
    """

    def __init__(self, history: int = 256, norm_type: float = 2.0) -> None:
        self.history = check_integer("history", history, at_least=1)
        self.norm_type = check_number("norm_type", norm_type, above=0, allow_inf=True)
        self.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(history={self.history}, norm_type={self.norm_type:g})"

    def __len__(self) -> int:
        return len(self._host_parts)

    def clear(self) -> None:
        """Forget all steps."""
        self._host_parts: list[_HostPart] = []
        self._oldest = 0
        self._names: tuple[str, ...] = ()
        self._numbers = torch.zeros(self.history, 0)
        self._norms = torch.zeros(self.history, 0)

    @torch.no_grad()
    def add(
        self,
        step: int,
        names: tuple[str, ...],
        per_tensor: Tensor,
        numbers: Tensor,
        *,
        kinds: tuple[str, ...] = (),
        epoch: int = 0,
        batch_idx: int = 0,
        lr: Sequence[float | Tensor] = (),
        loss_scale: float | Tensor | None = None,
    ) -> None:
        """Add a step, in the place of the oldest one where there are as many as are kept.

        Args:
            step: Number of the step.
            names: Names of the ``P`` parameters that have a gradient; which these are may change from step to step.
            per_tensor: Norm of each raw gradient, shape ``[P]``.
            numbers: Loss, raw total norm, clipped total norm, clip coefficient, and then for each of ``kinds`` whether
                it was voted (not 0), shape ``[4 + K]``.
            kinds: The ``K`` kinds of incident that were looked for.
            epoch: The epoch.
            batch_idx: The batch that completed the step.
            lr: The learning rate in force, of each parameter group; numbers, or 0-dim tensors, which are copied.
            loss_scale: The loss scale, a number or 0-dim; None if there is no scaler.

        Raises:
            ValueError: If a tensor has another shape.
        """
        if per_tensor.shape != (len(names),) or numbers.shape != (_NUMBERS + len(kinds),):
            raise ValueError(
                f"`per_tensor` and `numbers` must have shapes [{len(names)}] and [{_NUMBERS + len(kinds)}], as there "
                f"are names and kinds, got {list(per_tensor.shape)} and {list(numbers.shape)}"
            )
        settings = (loss_scale, *lr)
        on_device = tuple(place for place, value in enumerate(settings) if isinstance(value, Tensor))
        if on_device:
            tensors = [value.to(numbers, non_blocking=True) for value in settings if isinstance(value, Tensor)]
            numbers = torch.cat([numbers, torch.stack(tensors)])
        if names != self._names:
            self._names = names
        host_part = _HostPart(
            step,
            epoch,
            batch_idx,
            self._names,  # so that equal ones are one object in all steps
            kinds,
            tuple(None if value is None or isinstance(value, Tensor) else float(value) for value in settings),
            on_device,
        )
        place = self._place_for(host_part)
        self._numbers = _storage_for(numbers, self._numbers)
        self._norms = _storage_for(per_tensor, self._norms)
        self._numbers[place, : numbers.numel()].copy_(numbers)
        self._norms[place, : per_tensor.numel()].copy_(per_tensor)

    def rows(self, per: str = "parameter") -> list[StepRow]:
        """The steps, oldest first, by one transfer from the device.

        Args:
            per: Whose gradient norms to give: of each ``"parameter"``, or of each ``"layer"``, the module that owns it.

        Returns:
            One row for each step.

        Raises:
            ValueError: If ``per`` is something else.
        """
        check_choice("per", per, ("parameter", "layer"))
        size = len(self._host_parts)
        sizes = [self._numbers[:size].numel(), self._norms[:size].numel()]
        flat = torch.cat([self._numbers[:size].flatten().to(self._norms.device), self._norms[:size].flatten()]).cpu()
        numbers, norms = (part.reshape(size, -1) if size else part for part in flat.double().split(sizes))
        rows = []
        for age in range(size):
            place = (self._oldest + age) % size
            part = self._host_parts[place]
            names: Sequence[str] = part.names
            values = norms[place, : len(names)]
            if per == "layer":
                names, values = group_norms(names, values, self.norm_type)
            rows.append(part.complete(numbers[place].tolist(), dict(zip(names, values.tolist(), strict=True))))
        return rows

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the steps with the norms of layers, see :func:`write_history`."""
        write_history(self.rows(per="layer"), path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the steps with the norms of layers, see :func:`plot_history`."""
        plot_history(self.rows(per="layer"), path)

    def _place_for(self, host_part: _HostPart) -> int:
        if len(self._host_parts) < self.history:
            self._host_parts.append(host_part)
            return len(self._host_parts) - 1
        place = self._oldest
        self._host_parts[place] = host_part
        self._oldest = (place + 1) % self.history
        return place


class _HostPart(NamedTuple):
    """What the host knows of a step.

    Attributes:
        step: Number of the step.
        epoch: The epoch.
        batch_idx: The batch that completed the step.
        names: Names of the parameters that have a gradient.
        kinds: The kinds of incident that were looked for.
        settings: Loss scale and learning rates; None for those on the device, and for a loss scale that is not there.
        on_device: The places of those on the device, whose values come after the step's numbers.
    """

    step: int
    epoch: int
    batch_idx: int
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    settings: tuple[float | None, ...]
    on_device: tuple[int, ...]

    def complete(self, numbers: Sequence[float], norms: dict[str, float]) -> StepRow:
        """The step with its numbers from the device."""
        votes = numbers[_NUMBERS : _NUMBERS + len(self.kinds)]
        settings = list(self.settings)
        for place, value in zip(self.on_device, numbers[_NUMBERS + len(self.kinds) :], strict=False):
            settings[place] = value
        loss_scale, *rates = settings
        loss, norm, clipped_norm, coefficient = numbers[:_NUMBERS]
        return StepRow(
            self.step,
            self.epoch,
            self.batch_idx,
            tuple(math.nan if rate is None else rate for rate in rates),
            loss,
            norm,
            clipped_norm,
            coefficient,
            tuple(dict.fromkeys(kind for kind, vote in zip(self.kinds, votes, strict=True) if vote)),
            loss_scale,
            norms,
        )


def _storage_for(values: Tensor, storage: Tensor) -> Tensor:
    """The storage, or one with the same content that is large, precise, and near enough to take some values."""
    width = max(values.numel(), storage.shape[1])
    dtype = torch.promote_types(values.dtype, storage.dtype)
    if (width, dtype, values.device) == (storage.shape[1], storage.dtype, storage.device):
        return storage
    larger = values.new_zeros((storage.shape[0], width), dtype=dtype)
    larger[:, : storage.shape[1]] = storage
    return larger
