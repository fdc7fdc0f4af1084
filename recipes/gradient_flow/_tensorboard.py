"""The studies in TensorBoard: curves over the layers, one run a setting, and the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import get_args

from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from recipes.gradient_flow._study import StudyName
from recipes.gradient_flow._summary import Summary

__all__ = ["write_tensorboard"]


def write_tensorboard(summaries: Sequence[Summary], figures: Iterable[Path], path: Path) -> None:
    """Write medians over the seeds as scalars whose step is the layer, from 1 at the input, and the figures as images.

    Each activation and initialization is a run: ``initializations/relu/he``. In the study of depths it has a curve for
    each depth, and two over the depths. Event files that an earlier call left are removed.

    Args:
        summaries: Of one study or of both.
        figures: PNG files.
        path: The folder to write to.
    """
    for folder in (*get_args(StudyName), "figures"):  # others may keep their logs beside ours
        for old in (path / folder).rglob("events.out.tfevents.*"):
            old.unlink()
    for (study, activation, name), group in groupby(summaries, key=lambda each: each.setting[:3]):
        with SummaryWriter(path / study / activation / name) as writer:
            for summary in group:
                _write_layers(writer, summary, "" if study == "initializations" else f"/depth_{summary.setting.depth}")
                if study == "depths":
                    _write_depth(writer, summary)
    with SummaryWriter(path / "figures") as writer:
        for figure in figures:
            writer.add_image(figure.stem, imread(figure), dataformats="HWC")


def _write_layers(writer: SummaryWriter, summary: Summary, suffix: str) -> None:
    for layer, norm in enumerate(summary.by_layer(lambda m: m.gradient_norms), start=1):
        writer.add_scalar(f"gradient_norm{suffix}", norm.median, layer)
    for layer, signal in enumerate(summary.by_layer(lambda m: m.signal_stds), start=1):
        writer.add_scalar(f"signal_std{suffix}", signal.median, layer)


def _write_depth(writer: SummaryWriter, summary: Summary) -> None:
    writer.add_scalar("by_depth/first_gradient_norm", summary.of(lambda m: m.first).median, summary.setting.depth)
    ratio = summary.of(lambda m: m.ratio).median
    if not math.isnan(ratio):
        writer.add_scalar("by_depth/ratio", ratio, summary.setting.depth)
