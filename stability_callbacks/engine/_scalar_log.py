"""Records and metrics on their way from the device to the host: one transfer a log step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stability_callbacks.engine._hooks import Participants, StepHooks
from stability_callbacks.engine._logger_writes import LoggerWrites
from stability_callbacks.engine._records import PendingRecord

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
    due: Sequence[StepHooks]
    logged_step: int


class ScalarLog:
    """Gathers records and metrics on the device, and delivers them with as few waits as can be.

    A step that already waited for the device, to learn its verdict, does not wait again to log: what it sends is
    delivered after the next wait.

    Args:
        participants: The callbacks that read records.
        loggers: Where the metrics go.
    """

    def __init__(self, participants: Participants, loggers: LoggerWrites) -> None:
        self._participants = participants
        self._loggers = loggers
        self._records: list[PendingRecord] = []
        self._under_way: list[_Parcel] = []

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: PendingRecord) -> None:
        """Keep a finished step until its numbers are read."""
        self._records.append(record)

    def send(self, due: Sequence[StepHooks] = (), logged_step: int = 0) -> None:
        """Start the transfer of all records and of the metrics of the callbacks that want to log now.

        Args:
            due: The callbacks whose metrics are due.
            logged_step: Where they belong on the x-axis.
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
        receivers = [take for _, take in payloads]
        self._under_way.append(_Parcel(copy, self._records, receivers, metrics, due, logged_step))
        self._records = []

    def deliver(self) -> None:
        """Let the callbacks read everything sent, and hand its metrics to the loggers."""
        while self._under_way:
            parcel = self._under_way.pop(0)
            values = parcel.copy.read()
            of_records, of_receivers = values[: len(parcel.records)], values[len(parcel.records) :]
            for record, numbers in zip(parcel.records, of_records, strict=True):
                complete = record.complete(numbers)
                for callback in self._participants["on_step_record"]:
                    callback.on_step_record(complete)
            for take, numbers in zip(parcel.receivers, of_receivers, strict=True):
                take(numbers, parcel.logged_step)
            for callback in parcel.due:
                parcel.metrics.update(callback.host_scalars())
            self._loggers.log(parcel.metrics, parcel.logged_step)


def _put_together(metrics: dict[str, float], names: Sequence[str], values: list[float], logged_step: int) -> None:
    metrics.update(zip(names, values, strict=True))
