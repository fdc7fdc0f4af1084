"""Training batches in an order of their own, which go on where an interrupted run stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["ResumableLoader", "shuffled_batches"]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that tells Lightning's checkpoints how many batches of the epoch it has given."""

    trainer: L.Trainer | None = None
    _given = 0
    _restored = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # After a whole epoch, which Lightning may have cut short, a new one begins.
        self._given, self._restored = self._restored % self._batches_per_epoch, 0
        sampler = self.batch_sampler
        assert isinstance(sampler, _SkippingBatchSampler)
        sampler.skipped = self._given
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches given in the epoch that is under way."""
        return {"given": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next epoch begin after the batches already given."""
        self._restored = state_dict["given"]

    @property
    def _batches_per_epoch(self) -> int:
        limit = math.inf if self.trainer is None else self.trainer.num_training_batches
        return int(min(len(self), limit)) or len(self)


class _SkippingBatchSampler(BatchSampler):
    skipped = 0  # stays until the loader sets it anew: with workers, torch begins to iterate twice

    def __iter__(self) -> Iterator[list[int]]:
        return islice(super().__iter__(), self.skipped, None)


def shuffled_batches(
    dataset: Dataset[tuple[Tensor, ...]], batch_size: int, seed: int, trainer: L.Trainer | None, **options: Any
) -> ResumableLoader:
    """Load ``dataset`` in random batches of equal size.

    The order is a pure function of ``seed`` and the epoch, whatever else draws random numbers: two models trained from
    one seed meet the same batches in the same order. Each process of a distributed run gets its share.

    Args:
        dataset: What to load.
        batch_size: Samples a batch, on each process.
        seed: Seeds the order.
        trainer: Knows the number of processes and, through Lightning, tells the sampler the epoch.
        options: Further arguments of :class:`torch.utils.data.DataLoader`.

    Raises:
        ValueError: If there are fewer samples than make one batch on each process.
    """
    processes, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, processes, rank, shuffle=True, seed=seed, drop_last=True
    )
    if len(sampler) < batch_size:
        raise ValueError(f"`batch_size` is {batch_size}, but a process has only {len(sampler)} training samples")
    batches = _SkippingBatchSampler(sampler, batch_size, drop_last=True)
    # A generator of its own: each pass draws a number, and one more pass must not change what the model draws.
    generator = torch.Generator().manual_seed(seed)
    loader = ResumableLoader(dataset, batch_sampler=batches, generator=generator, **options)
    loader.trainer = trainer
    return loader
