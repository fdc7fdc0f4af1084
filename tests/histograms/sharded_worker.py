"""One of two processes that count the same tensors, sharded between them; started by test_sharded.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from stability_callbacks.histograms import measure_histograms
from tests.histograms.test_measure import FIELDS
from tests.process_pair import process_group


def check_shards() -> None:
    """Every process has the histograms of the whole tensors, whatever their placement."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    uneven = torch.randn(101, 7)
    uneven[3, 2], uneven[100, 6] = math.nan, math.inf
    # One row for two processes: the second has an empty shard.
    small = torch.randn(1, 500).bfloat16()
    columns = torch.randn(40, 30, dtype=torch.float64)
    whole = [("uneven", uneven), ("small", small), ("columns", columns), ("copies", uneven), ("terms", 2 * columns)]
    placed = [
        ("uneven", distribute_tensor(uneven, mesh, [Shard(0)])),
        ("small", distribute_tensor(small, mesh, [Shard(0)])),
        ("columns", distribute_tensor(columns, mesh, [Shard(1)])),
        ("copies", distribute_tensor(uneven, mesh, [Replicate()])),
        ("terms", DTensor.from_local(columns, mesh, [Partial()])),
    ]
    ours, expected = measure_histograms(placed), measure_histograms(whole)
    assert ours.count.tolist() == expected.count.tolist()
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field), rtol=1e-5, atol=1e-5, msg=field)
    assert ours.bucket_counts.sum(dim=1).tolist() == [705, 500, 1200, 705, 1200]
    assert ours.nonfinite.tolist() == [2, 0, 0, 2, 0]

    # To the last bit the same everywhere, or a decision made of them might not be.
    tables = [torch.empty_like(ours.pack()) for _ in range(2)]
    dist.all_gather(tables, ours.pack())
    assert torch.equal(tables[0], tables[1])

    # The sample is drawn at one stride on all processes.
    sampled = measure_histograms(placed, max_elements=100)
    assert ((sampled.count > 0) & (sampled.count <= 102)).all()
    assert sampled.nonfinite.tolist() == [2, 0, 0, 2, 0]

    reductions = 0
    all_reduce = dist.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal reductions
        reductions += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    measure_histograms([(f"{i}", distribute_tensor(columns, mesh, [Shard(0)])) for i in range(20)])
    assert reductions == 3


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), Path(sys.argv[2])):
        check_shards()
