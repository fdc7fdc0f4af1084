"""One of two processes that shard a model between them and initialize it; writes down what each sees of the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from stability_callbacks.initialization import LSUV, Auto, Kaiming, Orthogonal, Policy, TruncNormal
from tests.contracts.contract import whole
from tests.process_pair import process_group

POLICIES: dict[str, Policy] = {
    "auto": Auto(),
    "kaiming": Kaiming(mode="fan_out"),
    "orthogonal": Orthogonal(),
    "truncated": TruncNormal(),
}


class Model(nn.Module):
    """Uneven shards, a vector smaller than the number of processes, a tied weight and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=1)
        self.lstm = nn.LSTM(5, 3)
        self.body = nn.Sequential(nn.Linear(3, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 1))
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.head(self.frozen(hidden) + self.body(hidden))


def build(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def initialize(model: Model, policy: Policy) -> dict[str, object]:
    """Weights and report after an initialization from a fixed seed."""
    torch.manual_seed(1)
    report = policy.apply(model)
    return {
        "weights": {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()},
        "rows": [tuple(row) for row in report],
    }


def shard(model: Model) -> Model:
    fully_shard(model.body)
    fully_shard(model)
    return model


def main(rank: int, directory: Path) -> None:
    with process_group(rank, directory):
        torch.save(run(), directory / f"{rank}.pt")


def run() -> dict[str, object]:
    """Initialize sharded models by every policy."""
    results: dict[str, object] = {name: initialize(shard(build()), policy) for name, policy in POLICIES.items()}
    results["bfloat16"] = initialize(shard(build(torch.bfloat16)), Auto())

    sharded = shard(build())
    held = list(sharded.parameters())
    Auto().apply(sharded)
    results["same objects"] = all(one is other for one, other in zip(held, sharded.parameters(), strict=True))
    sharded(torch.tensor([[1, 2], [3, 4]])).square().mean().backward()
    results["gradients"] = all(each.grad is not None for each in sharded.parameters() if each.requires_grad)
    try:
        LSUV().apply(sharded, torch.tensor([[1, 2]]))
    except ValueError as error:
        results["lsuv"] = str(error)
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
