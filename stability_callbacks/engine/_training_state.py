"""What belongs to the state of training besides the model and its optimizers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stability_callbacks.engine._lightning import attached_trainer, both, callbacks_of

__all__ = ["averaged_models", "averaging_callbacks", "loss_scaler"]


def loss_scaler(trainer: pl.Trainer) -> Any | None:
    """The gradient scaler of fp16 training, if there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def averaging_callbacks(trainer: pl.Trainer) -> dict[Callback, list[nn.Module]]:
    """The callbacks that keep an average of the model (EMA, SWA), and the averages.

    An average is torch's ``AveragedModel``, or a module that mirrors the model parameter by parameter.
    """
    shapes = [parameter.shape for parameter in trainer.lightning_module.parameters()]
    kept = {}
    for callback in callbacks_of(trainer):
        modules = [value for value in vars(callback).values() if isinstance(value, nn.Module)]
        if averages := [module for module in modules if _mirrors(module, shapes)]:
            kept[callback] = averages
    return kept


def averaged_models(trainer: pl.Trainer) -> list[nn.Module]:
    """All averages of the model that callbacks keep."""
    return [model for models in averaging_callbacks(trainer).values() for model in models]


def _mirrors(module: nn.Module, shapes: list[Any]) -> bool:
    if isinstance(module, both(pl.LightningModule)) and attached_trainer(module) is not None:
        return False  # the model itself
    return isinstance(module, AveragedModel) or [parameter.shape for parameter in module.parameters()] == shapes
