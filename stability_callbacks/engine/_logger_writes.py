"""Writing to loggers, of which one may fail."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["LoggerWrites"]


class LoggerWrites:
    """Writes to every logger of a trainer; an observer must not end training.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._failed: set[int] = set()

    def write(self, write: Callable[[Logger], None]) -> None:
        """Write something to every logger. One that fails is warned of once."""
        for logger in self._trainer.loggers:
            try:
                write(logger)
            except Exception as error:  # noqa: BLE001  # whatever it is, training goes on
                if id(logger) not in self._failed:
                    self._failed.add(id(logger))
                    rank_zero_warn(f"{type(logger).__name__} could not log stability metrics: {error!r}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics, in one call to each logger, and save them.

        Args:
            metrics: Names and values; nothing is done for none.
            step: Where they belong on the x-axis.
        """

        def write(logger: Logger) -> None:
            logger.log_metrics(metrics=metrics, step=step)
            logger.save()

        if metrics:
            self.write(write)
