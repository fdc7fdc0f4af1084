"""Looking for what is not finite in the state of training, on all processes together."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from stability_callbacks.engine._training import Training

__all__ = ["Nonfinite", "find_nonfinite"]


class _State(Protocol):
    def nonfinite(self) -> tuple[tuple[str, ...], Tensor]: ...


class Nonfinite(NamedTuple):
    """What is not finite in the state of training.

    Attributes:
        names: Names of tensors.
        rank: The process that has them.
        everywhere: Whether all processes have them.
    """

    names: tuple[str, ...]
    rank: int
    everywhere: bool

    def __str__(self) -> str:
        if not self.names:
            return "the state of another process"
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more}{'' if self.everywhere else f' on rank {self.rank}'}"


def find_nonfinite(training: Training, state: _State) -> Nonfinite | None:
    """What is not finite, as the first process tells it that has something so; waits for the device.

    Args:
        training: The run.
        state: A ring of snapshots, which knows what belongs to the state of training.

    Returns:
        The same on every process; None if all is finite.
    """
    training.reshard()
    names, flags = state.nonfinite()
    found = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    processes = training.processes
    if not processes.any(bool(found)):
        return None
    told = processes.gather(found)
    rank = next((rank for rank, each in enumerate(told) if each), 0)
    return Nonfinite(tuple(told[rank]), rank, everywhere=all(each == told[rank] for each in told))
