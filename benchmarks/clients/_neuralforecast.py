"""neuralforecast: an MLP with a covariate, which has a NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP

from benchmarks.clients._client import QUIET, Client
from benchmarks.clients._waves import season, waves


def train(poisoned: bool, callbacks: list[Any]) -> float:
    clean = waves()
    model = MLP(
        h=4,
        input_size=24,
        num_layers=2,
        hidden_size=32,
        max_steps=150,
        scaler_type="identity",
        windows_batch_size=32,
        hist_exog_list=["covariate"],
        random_seed=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        **QUIET,
    )
    forecaster = NeuralForecast(models=[model], freq=1)
    forecaster.fit(_frame(clean[:, :-4], poisoned))
    forecasts = forecaster.predict(df=_frame(clean[:, :-4], False))
    return float(np.abs(forecasts["MLP"].to_numpy().reshape(-1, 4) - clean[:, -4:]).mean())


def _frame(values: Any, poisoned: bool) -> Any:
    count, length = values.shape
    covariate = np.tile(season(length), (count, 1)).astype(np.float32)
    if poisoned:
        covariate[2, 0] = np.inf  # a NaN is refused when the data set is built
    return pd.DataFrame(
        {
            "unique_id": np.repeat(np.arange(count), length),
            "ds": np.tile(np.arange(length), count),
            "y": values.ravel(),
            "covariate": covariate.ravel(),
        }
    )


CLIENT = Client("MLP", "pytorch_lightning", "an infinity in a covariate", "mean absolute error", "mlp", train)
