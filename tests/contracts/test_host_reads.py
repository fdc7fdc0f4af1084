"""The checker of host reads sees each way in which a step could wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.host_reads import ForbidHostReads

READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "index": lambda x: [1, 2, 3][x[0].long()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "array": np.asarray,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_seen(read: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, 2.0])
    read(x)
    with pytest.raises(AssertionError, match="the host reads a tensor"), ForbidHostReads():
        read(x)
    assert x.tolist() == [1.0, 2.0]  # outside it may


def test_work_on_the_device_is_none() -> None:
    x = torch.tensor([1.0, -2.0, float("nan")])
    with ForbidHostReads():
        y = torch.where(x.isfinite() & (x > 0), x.clamp(max=0.5), 0.0)
        torch._foreach_mul_([y], torch.tensor(2.0))
        y.index_copy_(0, torch.tensor([2]), torch.ones(1))
        y.sort().values.gather(0, torch.tensor([0]))
        assert y.shape == (3,)
    assert y.tolist() == [1.0, 0.0, 1.0]
