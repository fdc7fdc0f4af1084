"""Metrics on their way from the device to the loggers: one transfer and one call per logger and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stability_callbacks.callbacks._step_record import PendingRecord

if TYPE_CHECKING:
    from stability_callbacks.callbacks._base import StabilityCallback

__all__ = ["ScalarLog"]


class HostCopy:
    """A copy of some tensors to the host that can be asked for now and read later, without a wait in between.

    Args:
        tensors: Tensors of at most one dimension.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sizes = [tensor.numel() for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if not tensors:
            self._values = torch.zeros(0)
            return
        device = tensors[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64  # Metal has no double precision
        flat = torch.cat([tensor.detach().reshape(-1).to(device, wide) for tensor in tensors])
        if device.type == "cuda":
            self._values = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._values.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._values = flat.cpu()

    def read(self) -> list[list[float]]:
        """The tensors' values, waiting for the device where they have not arrived yet."""
        if self._event is not None:
            self._event.synchronize()
        return [values.tolist() for values in self._values.split(self._sizes)]


class _Parcel(NamedTuple):
    copy: HostCopy
    records: list[PendingRecord]
    receivers: list[Callable[[list[float], int], None]]
    metrics: dict[str, float]
    due: Sequence[StabilityCallback]
    x: int


class ScalarLog:
    """Gathers records and metrics on the device, and delivers them with as few waits as can be.

    A step that already waited for the device, to learn its verdict, does not wait again to log: what it sends is
    delivered after the next wait.

    Args:
        trainer: The trainer whose loggers get the metrics.
        callbacks: The callbacks that account for finished steps.
    """

    def __init__(self, trainer: pl.Trainer, callbacks: Sequence[StabilityCallback]) -> None:
        self._trainer = trainer
        self._callbacks = callbacks
        self._records: list[PendingRecord] = []
        self._under_way: list[_Parcel] = []
        self._failed_loggers: set[int] = set()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: PendingRecord) -> None:
        """Keep a finished step until its numbers are read."""
        self._records.append(record)

    def send(self, due: Sequence[StabilityCallback] = (), x: int = 0) -> None:
        """Start the transfer of all records and of the metrics of the callbacks that want to log now.

        Args:
            due: The callbacks whose metrics are due.
            x: Where on the x-axis they belong.
        """
        if not due and not self._records:
            return
        metrics: dict[str, float] = {}
        payloads: list[tuple[Tensor, Callable[[list[float], int], None]]] = [
            (values, partial(_put_together, metrics, names))
            for callback in due
            for names, values in callback.device_scalars()
        ]
        payloads += [payload for callback in due for payload in callback.device_payloads()]
        copy = HostCopy([*(record.values for record in self._records), *(values for values, _ in payloads)])
        self._under_way.append(_Parcel(copy, self._records, [take for _, take in payloads], metrics, due, x))
        self._records = []

    def deliver(self) -> None:
        """Account for everything sent and hand its metrics to the loggers."""
        while self._under_way:
            parcel = self._under_way.pop(0)
            values = parcel.copy.read()
            of_records, of_receivers = values[: len(parcel.records)], values[len(parcel.records) :]
            for record, numbers in zip(parcel.records, of_records, strict=True):
                complete = record.complete(numbers)
                for callback in self._callbacks:
                    callback.account(complete)
            for take, numbers in zip(parcel.receivers, of_receivers, strict=True):
                take(numbers, parcel.x)
            for callback in parcel.due:
                parcel.metrics.update(callback.host_scalars())
            self._log(parcel.metrics, parcel.x)

    def write(self, write: Callable[[Logger], None]) -> None:
        """Write something to every logger. One that fails is warned of once: an observer must not end training."""
        for logger in self._trainer.loggers:
            try:
                write(logger)
            except Exception as error:  # noqa: BLE001  # whatever it is, training goes on
                if id(logger) not in self._failed_loggers:
                    self._failed_loggers.add(id(logger))
                    rank_zero_warn(f"{type(logger).__name__} could not log stability metrics: {error!r}")

    def _log(self, metrics: dict[str, float], x: int) -> None:
        def write(logger: Logger) -> None:
            logger.log_metrics(metrics=metrics, step=x)
            logger.save()

        if metrics:
            self.write(write)


def _put_together(metrics: dict[str, float], names: Sequence[str], values: list[float], x: int) -> None:
    metrics.update(zip(names, values, strict=True))
