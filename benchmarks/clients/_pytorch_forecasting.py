"""pytorch-forecasting: DeepAR, with a NaN in the stored covariate."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, TimeSeriesDataSet
from pytorch_forecasting.data import EncoderNormalizer
from pytorch_forecasting.metrics import NormalDistributionLoss

from benchmarks.clients._client import QUIET, Client
from benchmarks.clients._waves import season, waves


def train(poisoned: bool, callbacks: list[Any]) -> float:
    clean = waves()
    data = _data_set(clean[:, :-4])
    if poisoned:
        data.data["reals"][2, 0] = float("nan")  # the data frame's own check refuses it
    model = DeepAR.from_dataset(
        data, hidden_size=16, rnn_layers=1, learning_rate=1e-2, loss=NormalDistributionLoss(), log_interval=-1
    )
    trainer = pl.Trainer(**QUIET, max_epochs=8, logger=False, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=32))
    last = TimeSeriesDataSet.from_dataset(data, _frame(clean), predict=True, stop_randomization=True)
    forecasts = model.predict(last, mode="prediction", trainer_kwargs={**QUIET, "logger": False})
    return float(np.abs(np.asarray(forecasts) - clean[:, -4:]).mean())


def _frame(values: Any) -> Any:
    count, length = values.shape
    return pd.DataFrame(
        {
            "series": np.repeat(np.arange(count), length).astype(str),
            "time": np.tile(np.arange(length), count),
            "covariate": np.tile(season(length), count),
            "y": values.ravel(),
        }
    )


def _data_set(values: Any) -> Any:
    return TimeSeriesDataSet(
        _frame(values),
        time_idx="time",
        target="y",
        group_ids=["series"],
        max_encoder_length=24,
        max_prediction_length=4,
        time_varying_known_reals=["covariate"],
        time_varying_unknown_reals=["y"],
        target_normalizer=EncoderNormalizer(),
    )


CLIENT = Client("DeepAR", "lightning", "a NaN in a covariate", "mean absolute error", "rnn", train)
