"""chemprop: a message-passing network with a descriptor, which is NaN in one molecule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from chemprop import data, featurizers, models, nn

from benchmarks.clients._client import QUIET, Client


def train(poisoned: bool, callbacks: list[Any]) -> float:
    torch.manual_seed(0)
    points = _molecules()
    if poisoned:
        points[7].x_d[0] = np.nan
    messages = nn.BondMessagePassing(d_h=32, depth=2)
    head = nn.RegressionFFN(input_dim=messages.output_dim + 1, hidden_dim=32)
    model = models.MPNN(messages, nn.MeanAggregation(), head, batch_norm=True)
    trainer = pl.Trainer(**QUIET, max_epochs=20, logger=False, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(model, _loader(points, shuffle=True))
    clean = _molecules()
    predictions: Any = trainer.predict(model, _loader(clean, shuffle=False))
    predicted = torch.cat(predictions)
    targets = torch.tensor(np.stack([point.y for point in clean]))
    return float((predicted - targets).abs().mean())


def _molecules() -> list[Any]:
    """Chains of carbon with an oxygen in them; the target goes by their length and the descriptor."""
    points = []
    for length in range(1, 9):
        for place in range(1, 9):
            descriptor = np.array([place / 8])
            smiles = "C" * length + "O" + "C" * place
            target = descriptor + length / 8
            points.append(data.MoleculeDatapoint.from_smi(smiles, y=target, x_d=descriptor))
    return points


def _loader(points: list[Any], shuffle: bool) -> Any:
    molecules = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())
    return data.build_dataloader(molecules, batch_size=8, shuffle=shuffle, seed=0)


CLIENT = Client("MPNN", "lightning", "a NaN descriptor of one of 64 molecules", "mean absolute error", "mlp", train)
