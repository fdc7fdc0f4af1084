"""Training by hand, in plain PyTorch: a small network, its data, and a loop with room for a policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stability_callbacks.clipping import NormClip

Batch = tuple[Tensor, Tensor, float]
Train = Callable[..., list[float]]

STEPS = 20
SPIKE = 13  # the batch whose gradients explode


class Net(nn.Module):
    """Recurrent, residual and dense layers: something for every policy."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(x)[0][:, -1]
        hidden = hidden + self.down(F.relu(self.up(hidden)))
        return self.head(hidden)


def make_batches() -> list[Batch]:
    """Sequences, the class of each, and a factor of the loss that is huge once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 16, 5, 3, generator=generator)
    y = (x.sum((2, 3)) > 0).long()
    return [(x[step], y[step], 1e4 if step == SPIKE else 1.0) for step in range(STEPS)]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03)


def by_hand(
    net: nn.Module,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    before_step: Callable[[int, torch.optim.Optimizer], Any] = lambda step, optimizer: None,
    after_step: Callable[[], Any] = lambda: None,
    batches: list[Batch] | None = None,
) -> list[float]:
    """Train in plain PyTorch; returns the losses."""
    optimizer = make_optimizer(net.parameters())
    losses = []
    for step, (x, y, factor) in enumerate(make_batches() if batches is None else batches):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        (factor * loss).backward()
        before_step(step, optimizer)
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


def clip(net: nn.Module) -> None:
    NormClip(max_norm=1.0).clip_(net.parameters())


def learns(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.8 * sum(losses[:5])
