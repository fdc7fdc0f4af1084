"""A copy of the metrics that training accumulates, taken before a forward pass and put back if the step is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["MetricBackup"]


class MetricBackup:
    """Backs up the running epoch results of ``self.log`` and the states of the model's torchmetrics objects.

    A skipped batch must not count in an epoch's mean: one NaN in it, and ``EarlyStopping``, ``ModelCheckpoint`` and
    ``ReduceLROnPlateau`` act on NaN. What was logged for the step itself (``on_step``) stays as it was seen.

    Args:
        module: The model.
        results: Gives Lightning's metrics of the training epoch, as they are now.
    """

    def __init__(self, module: nn.Module, results: Callable[[], Iterable[Metric]]) -> None:
        self._module = module
        self._results = results
        self._metrics: list[Metric] = []
        self._taken: dict[int, _State] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for metrics that were added to the model."""
        self._metrics = [module for module in self._module.modules() if isinstance(module, Metric)]

    def take(self) -> None:
        """Back up every metric as it is now."""
        known = self._taken
        copies: dict[int, Any] = {}
        self._taken = {id(each): _state_of(each, known.get(id(each)), copies) for each in self._all()}

    def restore(self) -> None:
        """Put every metric back as it was; one that appeared since is as new."""
        copies: dict[int, Any] = {}
        for metric, state in self._changed():
            for name, value in state.values.items():
                setattr(metric, name, _copied(value, copies))
            metric._update_count = state.update_count
            metric._computed = None

    def restorable_where(self) -> bool:
        """Whether :meth:`restore_where` can put back what changed since; a look at the host only."""
        return all(
            isinstance(value, Tensor)
            and isinstance(now := getattr(metric, name), Tensor)
            and (now.shape, now.dtype, now.device) == (value.shape, value.dtype, value.device)
            and metric._reductions[name] is not _MEAN  # torchmetrics weighs these by a count that the host keeps
            for metric, state in self._changed()
            for name, value in state.values.items()
        )

    def restore_where(self, condition: Tensor) -> None:
        """Put every metric back if a condition holds that only the device knows.

        Args:
            condition: 0-dim boolean on the device.
        """
        chosen: dict[int, Tensor] = {}
        for metric, state in self._changed():
            for name, value in state.values.items():
                now = getattr(metric, name)
                if id(now) not in chosen:
                    chosen[id(now)] = torch.where(condition.to(now.device), value, now)
                setattr(metric, name, chosen[id(now)])
            metric._computed = None

    def adopt_changes_since(self, other: MetricBackup) -> None:
        """What happened to metrics since another backup was taken stays, also if this one is restored."""
        copies: dict[int, Any] = {}
        for metric, _ in other._changed():
            self._taken[id(metric)] = _state_of(metric, None, copies)

    def _all(self) -> Iterator[Metric]:
        yield from self._metrics
        yield from self._results()

    def _changed(self) -> Iterator[tuple[Metric, _State]]:
        for metric in self._all():
            state = self._taken.get(id(metric)) or _State.new(metric)
            if state.marks != _marks(metric):
                yield metric, state


class _State(NamedTuple):
    metric: Metric  # kept, so that its id is not given to another
    values: dict[str, Any]
    update_count: int
    marks: tuple[Any, ...]

    @classmethod
    def new(cls, metric: Metric) -> _State:
        """The state of a metric that nothing has updated."""
        values = {name: _copied(default, {}) for name, default in metric._defaults.items()}
        return cls(metric, {name: _on_device(metric, name, value) for name, value in values.items()}, 0, ())


_MEAN = torch.mean


def _on_device(metric: Metric, name: str, value: Any) -> Any:
    now = getattr(metric, name, None)
    return value.to(now.device) if isinstance(value, Tensor) and isinstance(now, Tensor) else value


def _state_of(metric: Metric, known: _State | None, copies: dict[int, Any]) -> _State:
    marks = _marks(metric)
    if known is not None and known.marks == marks:
        return known
    values = {name: _copied(getattr(metric, name), copies) for name in metric._defaults}
    return _State(metric, values, metric._update_count, marks)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a state: a tensor, or a list whose tensors are only ever added or removed. Shared ones stay shared."""
    if id(value) not in copies:
        copies[id(value)] = value.detach().clone() if isinstance(value, Tensor) else list(value)
    return copies[id(value)]


def _marks(metric: Metric) -> tuple[Any, ...]:
    """Tells, by a look at the host only, whether a metric was updated or reset."""
    states = (getattr(metric, name) for name in metric._defaults)
    return metric._update_count, *(
        (id(each), each._version if isinstance(each, Tensor) else len(each)) for each in states
    )
