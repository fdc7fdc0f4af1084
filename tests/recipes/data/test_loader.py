from __future__ import annotations

import math
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from recipes.data._loader import ResumableLoader, shuffled_batches

SAMPLES = 22
BATCHES = 5  # of 4: the last two samples of an epoch are left out


def loader(
    seed: int = 0, processes: int = 1, rank: int = 0, batch_size: int = 4, limit: float = BATCHES, workers: int = 0
) -> ResumableLoader:
    trainer: Any = SimpleNamespace(world_size=processes, global_rank=rank, num_training_batches=limit)
    return shuffled_batches(TensorDataset(torch.arange(SAMPLES)), batch_size, seed, trainer, num_workers=workers)


def epoch(batches: ResumableLoader, number: int) -> list[list[int]]:
    batches.batch_sampler.sampler.set_epoch(number)  # type: ignore[union-attr]
    return [batch.tolist() for (batch,) in batches]


def test_each_epoch_has_an_order_of_its_own_that_comes_back() -> None:
    first, second = epoch(loader(), 0), epoch(loader(), 1)
    assert [len(batch) for batch in first] == [4] * BATCHES == [len(batch) for batch in second]
    assert len(set(chain(*first))) == 4 * BATCHES
    assert first != second
    torch.rand(3)
    assert epoch(loader(), 0) == first
    assert epoch(loader(seed=1), 0) != first


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("given", [0, 1, 3, BATCHES])
def test_a_restored_loader_goes_on_after_the_batches_given(given: int, workers: int) -> None:
    whole, interrupted, restored = loader(), loader(), loader(workers=workers)
    expected = epoch(whole, 3)
    interrupted.batch_sampler.sampler.set_epoch(3)  # type: ignore[union-attr]
    batches = iter(interrupted)
    for _ in range(given):
        next(batches)
    restored.load_state_dict(interrupted.state_dict())
    # After a whole epoch the next one begins at its beginning.
    assert epoch(restored, 3) == expected[given % BATCHES :]
    assert epoch(restored, 3) == expected
    assert restored.state_dict() == {"given": BATCHES}


@pytest.mark.parametrize("limit", [3, math.inf])
def test_an_epoch_that_lightning_cuts_short_is_a_whole_one(limit: float) -> None:
    restored = loader(limit=limit)
    restored.load_state_dict({"given": 3})
    assert len(epoch(restored, 1)) == (BATCHES if limit == 3 else BATCHES - 3)


def test_the_place_of_a_restored_loader_counts_from_the_beginning_of_the_epoch() -> None:
    restored = loader()
    restored.load_state_dict({"given": 2})
    next(iter(restored))
    assert restored.state_dict() == {"given": 3}


def test_processes_share_the_samples() -> None:
    shares = [set(chain(*epoch(loader(processes=2, rank=rank), 0))) for rank in (0, 1)]
    assert not shares[0] & shares[1]
    assert len(shares[0]) == len(shares[1]) == 8


def test_too_few_samples_for_one_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="`batch_size` is 12, but a process has only 11 training samples"):
        loader(processes=2, batch_size=12)
