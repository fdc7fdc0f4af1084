"""Trainers that take turns within one process, so that all see the same machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["BatonLoader", "take_turns"]


class Baton:
    """Says whose turn it is among ``count`` threads."""

    def __init__(self, count: int) -> None:
        self._turn = 0
        self._count = count
        self._gone: set[int] = set()
        self._changed = threading.Condition()

    def wait(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == index)

    def pass_on(self, index: int, *, leave: bool = False) -> None:
        with self._changed:
            if leave:
                self._gone.add(index)
            if len(self._gone) < self._count and self._turn == index:
                self._turn = (index + 1) % self._count
                while self._turn in self._gone:
                    self._turn = (self._turn + 1) % self._count
            self._changed.notify_all()


class BatonLoader:
    """A loader that hands out one batch over and over, waits for its turn, and times what is done with each batch.

    Args:
        batch: The batch.
        steps: Number of batches in all.
        steps_per_turn: Batches handed out before the turn passes on. On a GPU more than one, so that the host can run
            ahead of the device as it does in real training.
        clock: Tells the time in seconds.

    Attributes:
        seconds: For each turn the time per step, from a batch being handed out to the request for the next.
    """

    def __init__(self, batch: Any, steps: int, steps_per_turn: int, clock: Callable[[], float]) -> None:
        self.batch = batch
        self.steps = steps
        self.steps_per_turn = steps_per_turn
        self.clock = clock
        self.seconds: list[float] = []
        self.baton: Baton | None = None
        self.index = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        assert self.baton is not None
        for _ in range(self.steps // self.steps_per_turn):
            self.baton.wait(self.index)
            _synchronize()
            start = self.clock()
            for _ in range(self.steps_per_turn):
                yield self.batch
            _synchronize()
            self.seconds.append((self.clock() - start) / self.steps_per_turn)
            self.baton.pass_on(self.index)


def take_turns(runs: Sequence[tuple[BatonLoader, Callable[[], None]]]) -> None:
    """Run several trainings, each in a thread, which take turns as their loaders hand out batches.

    Args:
        runs: The loader of each training, and what starts it.

    Raises:
        RuntimeError: If a training failed.
    """
    baton = Baton(len(runs))
    failures: list[BaseException] = []

    def run(loader: BatonLoader, start: Callable[[], None]) -> None:
        try:
            start()
        except BaseException as error:  # noqa: BLE001  # raised again where the threads are joined
            failures.append(error)
        finally:
            baton.pass_on(loader.index, leave=True)

    threads = []
    for index, (loader, start) in enumerate(runs):
        loader.baton, loader.index = baton, index
        threads.append(threading.Thread(target=run, args=(loader, start)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(runs)} trainings failed") from failures[0]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
