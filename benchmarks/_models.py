"""The networks whose training is timed."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

__all__ = ["MODELS", "Classifier", "LogsGradNorm"]


class Transformer(nn.Module):
    """A pre-norm causal language model over 256 symbols."""

    def __init__(self, width: int, layers: int, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, max(width // 64, 1), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits.transpose(1, 2)


def _mlp() -> nn.Module:
    layers = [module for _ in range(19) for module in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def _mlp_batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 256), torch.randint(10, (size,))


def _token_batch(size: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (size, 65))
    return tokens[:, :-1], tokens[:, 1:]


# name: network, batch, kind for `stability_suite`
MODELS = {
    "mlp-20": (_mlp, _mlp_batch, "mlp"),
    "transformer-1m": (lambda: Transformer(128, 5), _token_batch, "transformer"),
    "transformer-10m": (lambda: Transformer(320, 8), _token_batch, "transformer"),
}


class Classifier(pl.LightningModule):
    """Cross-entropy and AdamW around a network."""

    def __init__(self, net: nn.Module, fused: bool) -> None:
        super().__init__()
        self.net = net
        self.fused = fused

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.fused or None)


class LogsGradNorm(Classifier):
    """The same with gradient norms logged as Lightning's documentation shows it."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(grad_norm(self, norm_type=2))
