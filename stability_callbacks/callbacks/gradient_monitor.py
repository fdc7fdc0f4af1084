"""The callback that logs gradient norms, weight norms, update ratios and histograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

from stability_callbacks._validation import check_bool, check_choice, check_integer, check_number
from stability_callbacks.engine import OptimizerStep, Phase, StabilityCallback, Training
from stability_callbacks.gradient_pass import (
    GradientPass,
    combine_norms,
    group_norms,
    layer_of,
    measure_gradients,
    tensor_norms,
)
from stability_callbacks.histograms import Histograms, measure_histograms

__all__ = ["GradientMonitor"]

# Histograms are expensive, so by default there is one for this many log steps, and one at the first.
_LOGS_PER_HISTOGRAM = 10

_GROUP_OF = {"total": lambda name: "total", "layer": layer_of, "parameter": lambda name: name}


class GradientMonitor(StabilityCallback):
    r"""Logs how large gradients, weights and updates are, and how they are distributed, without changing a bit.

    The first thing to add when training misbehaves. Norms are those of the raw gradients, before any clipping; the
    total after clipping stands beside them. The update ratio tells whether the learning rate fits the weights: around
    1e-3 is healthy, far less is frozen, 1e-1 is about to break.

    .. math:: \lVert g \rVert_p,\qquad
              \lVert w \rVert_p,\qquad
              \text{update ratio} = \lVert w_{\text{new}} - w_{\text{old}} \rVert_p \,/\, \lVert w_{\text{old}} \rVert_p

    Everything is measured on the device, and only on log steps; it goes to the loggers in one call. Histograms are
    counted on the device too and go to loggers that can take them (TensorBoard); other loggers get the scalars.

    Args:
        norm_type: The ``p`` of the norm: a positive number or ``inf``. Default 2.
        per: What gets a norm besides the total: each ``"layer"`` (default), each ``"parameter"``, or nothing
            (``"total"``).
        histograms: Whether to log histograms of gradients (and of weights, with ``weights``). Default True.
        weights: Whether to log weight norms and histograms. Default True.
        updates: Whether to log update ratios, which copies the weights on log steps. Default True.
        every_n_steps: Optimizer steps between logs. Default: the trainer's ``log_every_n_steps``.
        histogram_every_n_steps: Optimizer steps between histograms. Default: the first log step and then every tenth.
        max_histogram_elements: Larger tensors are sampled down to this many elements for their histogram.
            Default 65,536.
        progress_bar: Whether the total norm is also shown in the progress bar. Default False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> from stability_callbacks import GradientMonitor
        >>> monitor = GradientMonitor(per="parameter", every_n_steps=10)

    Metrics:
        ========================== ===========================================================================
        ``grad_norm/total``        norm over all gradients, raw; with several optimizers over those that stepped
                                   in the batch, and ``grad_norm/total/<optimizer>`` for each
        ``grad_norm/<layer>``      norm of a layer's (or parameter's) gradients, raw
        ``grad_norm_clipped/total`` norm over all gradients after clipping, where something may have clipped
        ``weight_norm/<layer>``    norm of a layer's weights before the step
        ``update_ratio/<layer>``   relative size of the update; left out where the weights were all zero
        ``grad_nonfinite/<parameter>`` number of non-finite elements, on histogram steps, where there are any
        ``gradients/<parameter>``  histogram of the raw gradient's finite elements
        ``weights/<parameter>``    histogram of the weights before the step
        ========================== ===========================================================================

        With ``per="total"``, weight norms and update ratios are those of all weights together.
    """

    phase = Phase.OBSERVE

    _histograms_wanted: bool
    _counted: list[Histograms]
    _scalars: list[tuple[Sequence[str], Tensor]]
    _totals: list[Tensor]
    _total: Tensor | None
    _ratios: list[tuple[Sequence[str], Tensor]]
    _metrics: dict[str, float]
    _before: dict[int, _Weights]

    def __init__(
        self,
        norm_type: float = 2.0,
        per: str = "layer",
        histograms: bool = True,
        weights: bool = True,
        updates: bool = True,
        every_n_steps: int | None = None,
        histogram_every_n_steps: int | None = None,
        max_histogram_elements: int = 65_536,
        progress_bar: bool = False,
    ) -> None:
        super().__init__()
        self.norm_type = check_number("norm_type", norm_type, above=0, allow_inf=True)
        self.per = check_choice("per", per, tuple(_GROUP_OF))
        self.histograms = check_bool("histograms", histograms)
        self.weights = check_bool("weights", weights)
        self.updates = check_bool("updates", updates)
        self.every_n_steps = every_n_steps if every_n_steps is None else _cadence("every_n_steps", every_n_steps)
        self.histogram_every_n_steps = (
            histogram_every_n_steps
            if histogram_every_n_steps is None
            else _cadence("histogram_every_n_steps", histogram_every_n_steps)
        )
        self.max_histogram_elements = check_integer("max_histogram_elements", max_histogram_elements, at_least=1)
        self.progress_bar = check_bool("progress_bar", progress_bar)
        # Two monitors may log the same metric from different norms: which one wins must not depend on the list.
        self._state_key = self._generate_state_key(**{key: value for key, value in vars(self).items() if key[0] != "_"})
        self._forget()

    @property
    def state_key(self) -> str:
        return self._state_key

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._forget()

    def norm_types(self) -> list[float]:
        return [self.norm_type]

    def prepare(self, training: Training) -> None:
        # The same on all ranks, since the histograms of sharded tensors are counted together.
        wanted = self.histograms and any(_takes_histograms(logger) for logger in training.trainer.loggers)
        self._histograms_wanted = training.trainer.strategy.broadcast(wanted)

    def logs_now(self, training: Training) -> bool:
        return self._scalars_due(training) or self._histograms_due(training)

    def observe(self, step: OptimizerStep) -> None:
        assert step.gradients is not None
        if self._histograms_due(self.training):
            self._count_histograms(step, step.gradients)
        if not self._scalars_due(self.training):
            return
        norms = step.gradients.norms(self.norm_type)
        self._totals.append(norms.total)
        if step.suffix:
            self._add([f"grad_norm/total{step.suffix}"], norms.total.reshape(1))
        if self.per != "total":
            groups, values = group_norms(norms.names, norms.per_tensor, self.norm_type, _GROUP_OF[self.per])
            self._add([f"grad_norm/{group}" for group in groups], values)

    def before_update(self, step: OptimizerStep) -> None:
        if not self._scalars_due(self.training) or not step.gradients:
            return
        if step.gradients.changed() and not step.skipped:
            clipped = measure_gradients(step.gradients.parameters, self.norm_type, step.inverse_scale)
            self._add([f"grad_norm_clipped/total{step.suffix}"], clipped.total.reshape(1))
        if not self.weights and not self.updates:
            return
        named = [(name, parameter) for name, parameter in step.parameters if parameter.requires_grad]
        names = [name for name, _ in named]
        weights = [parameter.detach() for _, parameter in named]
        groups, norms = group_norms(names, tensor_norms(weights, self.norm_type), self.norm_type, _GROUP_OF[self.per])
        if self.weights:
            self._add([f"weight_norm/{group}" for group in groups], norms)
        if self.updates:
            self._before[step.index] = _Weights(names, weights, [weight.clone() for weight in weights], norms)

    def after_update(self, step: OptimizerStep) -> None:
        before = self._before.pop(step.index, None)
        if before is None:
            return
        # Tensor by tensor, since grouped operations refuse a mixture of whole and sharded ones; log steps only.
        updates = [now - old for now, old in zip(before.now, before.old, strict=True)]
        groups, norms = group_norms(
            before.names, tensor_norms(updates, self.norm_type), self.norm_type, _GROUP_OF[self.per]
        )
        self._ratios.append((groups, norms / before.norms))

    def device_scalars(self) -> list[tuple[Sequence[str], Tensor]]:
        scalars, self._scalars = self._scalars, []
        totals, self._totals = self._totals, []
        if totals:
            self._total = combine_norms(torch.stack(totals), self.norm_type)
            scalars.append((["grad_norm/total"], self._total.reshape(1)))
        return scalars

    def device_payloads(self) -> Sequence[tuple[Tensor, Callable[[list[float], int], None]]]:
        ratios, self._ratios = self._ratios, []
        counted, self._counted = self._counted, []
        return [(values, partial(self._take_ratios, groups)) for groups, values in ratios] + [
            (histograms.pack().flatten(), partial(self._take_histograms, histograms.names)) for histograms in counted
        ]

    def host_scalars(self) -> Mapping[str, float]:
        metrics, self._metrics = self._metrics, {}
        return metrics

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        total, self._total = self._total, None
        if self.progress_bar and total is not None:
            pl_module.log("grad_norm/total", total, prog_bar=True, logger=False)

    def _add(self, names: Sequence[str], values: Tensor) -> None:
        self._scalars.append((names, values))

    def _take_ratios(self, groups: Sequence[str], ratios: list[float], x: int) -> None:
        self._metrics.update(
            {
                f"update_ratio/{group}": ratio
                for group, ratio in zip(groups, ratios, strict=True)
                if math.isfinite(ratio)
            }
        )

    def _scalars_due(self, training: Training) -> bool:
        return training.is_logging_step(self.every_n_steps)

    def _histograms_due(self, training: Training) -> bool:
        if not self._histograms_wanted:
            return False
        if self.histogram_every_n_steps is not None:
            return training.is_logging_step(self.histogram_every_n_steps)
        every = training.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        return self._scalars_due(training) and (training.logged_step + 1) // every % _LOGS_PER_HISTOGRAM == 1

    def _count_histograms(self, step: OptimizerStep, gradients: GradientPass) -> None:
        pairs = gradients.parameters + (step.parameters if self.weights else [])
        if not self.training.trainer.is_global_zero and not any(isinstance(p, DTensor) for _, p in pairs):
            return  # every rank has whole tensors, and only the first one writes
        scale = gradients.inverse_scale
        named = [
            (f"gradients/{name}", parameter.grad if scale is None else parameter.grad * scale)
            for name, parameter in gradients.parameters
            if parameter.grad is not None
        ]
        if self.weights:
            named += [(f"weights/{name}", parameter.detach()) for name, parameter in step.parameters]
        self._counted.append(measure_histograms(named, max_elements=self.max_histogram_elements))

    def _take_histograms(self, names: tuple[str, ...], numbers: list[float], x: int) -> None:
        table = torch.tensor(numbers, dtype=torch.float64).reshape(len(names), -1)
        histograms = Histograms.unpack(names, table)
        for name, count in zip(names, histograms.nonfinite.tolist(), strict=True):
            kind, _, parameter = name.partition("/")
            if count and kind == "gradients":
                self._metrics[f"grad_nonfinite/{parameter}"] = count
        raw = list(histograms.raw())

        def write(logger: Logger) -> None:
            if _takes_histograms(logger):
                for histogram in raw:
                    logger.experiment.add_histogram_raw(**histogram, global_step=x)  # type: ignore[attr-defined]

        if self.training.processes.is_first:
            self.training.loggers.write(write)

    def _forget(self) -> None:
        self._histograms_wanted = False
        self._counted = []
        self._scalars = []
        self._totals = []
        self._total = None
        self._ratios = []
        self._metrics = {}
        self._before = {}


class _Weights(NamedTuple):
    """Weights and a copy of what they were before the update."""

    names: list[str]
    now: list[Tensor]
    old: list[Tensor]
    norms: Tensor


def _takes_histograms(logger: Logger) -> bool:
    return hasattr(getattr(logger, "experiment", None), "add_histogram_raw")


def _cadence(name: str, value: int) -> int:
    return check_integer(name, value, at_least=1)
