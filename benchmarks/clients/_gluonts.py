"""gluonts: DeepAR, with a NaN in a dynamic feature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator

from benchmarks.clients._client import QUIET, Client
from benchmarks.clients._waves import LENGTH, season, waves


def train(poisoned: bool, callbacks: list[Any]) -> float:
    np.random.seed(0)  # noqa: NPY002  # gluonts samples its windows from it
    torch.manual_seed(0)
    clean = waves(count=32)
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=4,
        context_length=24,
        num_layers=1,
        hidden_size=16,
        num_feat_dynamic_real=1,
        lags_seq=[1, 12],
        time_features=[],
        lr=1e-2,
        batch_size=16,
        num_batches_per_epoch=20,
        trainer_kwargs={**QUIET, "max_epochs": 8, "callbacks": callbacks},
    )
    predictor = estimator.train(_data_set(clean[:, :-4], poisoned))
    forecasts = [each.mean for each in predictor.predict(_data_set(clean[:, :-4], forecast=True))]
    return float(np.abs(np.stack(forecasts) - clean[:, -4:]).mean())


def _data_set(values: Any, poisoned: bool = False, forecast: bool = False) -> Any:
    # Training needs the feature where the target is known, a forecast beyond it.
    feature = season(LENGTH if forecast else values.shape[1])[None]
    entries = []
    for index, target in enumerate(values):
        features = feature.copy()
        if poisoned and index == 2:
            features[0, 50] = np.nan
        entries.append({"start": pd.Period("2020-01-01", "D"), "target": target, "feat_dynamic_real": features})
    return ListDataset(entries, freq="D")


CLIENT = Client("DeepAREstimator", "lightning", "a NaN in a feature", "mean absolute error", "rnn", train)
