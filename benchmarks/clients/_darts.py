"""darts: a temporal convolutional network, one of whose series has a gap."""

from __future__ import annotations

from typing import Any

import numpy as np
from darts import TimeSeries
from darts.models import TCNModel

from benchmarks.clients._client import QUIET, Client
from benchmarks.clients._waves import waves


def train(poisoned: bool, callbacks: list[Any]) -> float:
    clean = waves()
    values = clean[:, :-4].copy()
    if poisoned:
        values[2, 0] = np.nan  # in one window, so that one batch in an epoch is bad
    model = TCNModel(
        input_chunk_length=24,
        output_chunk_length=4,
        n_epochs=10,
        batch_size=32,
        random_state=0,
        pl_trainer_kwargs={**QUIET, "callbacks": callbacks},
    )
    model.fit([TimeSeries.from_values(each) for each in values])
    known = [TimeSeries.from_values(each) for each in clean[:, :-4]]
    forecasts = np.stack([each.values()[:, 0] for each in model.predict(4, series=known)])
    return float(np.abs(forecasts - clean[:, -4:]).mean())


CLIENT = Client("TCNModel", "pytorch_lightning", "a NaN in one of 8 series", "mean absolute error", "cnn", train)
