"""How much of the gradient reaches the first time step of a recurrent network, before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from recipes.data import Digits
from recipes.models import CellName, PixelRNN
from recipes.results import Sheet
from stability_callbacks._atomic import atomic_path
from stability_callbacks.initialization import Recurrent

__all__ = ["NETWORKS", "Network", "draw", "gradient_norms", "gradient_through_time", "measure", "sheet"]

BATCH_SIZE = 32
COLORS: dict[CellName, str] = {"lstm": "#0072b2", "gru": "#009e73", "rnn_tanh": "#d55e00", "rnn_relu": "#000000"}
LABEL_HEIGHT = 0.052  # in shares of the axis, so that no two labels touch


@dataclass(frozen=True)
class Network:
    """A cell and how it starts.

    Args:
        cell: The cell.
        policy: Initializes it; None leaves PyTorch's default.
        recurrent_std: Careless normal weights from hidden to hidden.
        line: Line style in the picture; the color stands for the cell.
    """

    cell: CellName
    policy: Recurrent | None = None
    recurrent_std: float | None = None
    line: str = "-"

    def fresh(self, inputs: torch.Size, outputs: int, hidden_size: int) -> PixelRNN:
        """A new network of this kind, drawn from the global random stream."""
        model = PixelRNN(
            inputs,
            outputs,
            torch.optim.SGD,
            cell=self.cell,
            hidden_size=hidden_size,
            recurrent_std=self.recurrent_std,
        )
        if self.policy is not None:
            self.policy.apply(model)
        return model


NETWORKS: Mapping[str, Network] = {
    "ReLU RNN, N(0, 0.25)": Network("rnn_relu", recurrent_std=0.25),
    "ReLU RNN, orthogonal": Network("rnn_relu", Recurrent(), line="--"),
    "LSTM, orthogonal, forget bias 2": Network("lstm", Recurrent(forget_bias=2), line=":"),
    "LSTM, orthogonal, forget bias 1": Network("lstm", Recurrent(forget_bias=1), line="-."),
    "LSTM, orthogonal, forget bias 0": Network("lstm", Recurrent(forget_bias=0), line="--"),
    "LSTM, default": Network("lstm"),
    "tanh RNN, orthogonal": Network("rnn_tanh", Recurrent(), line="--"),
    "tanh RNN, default": Network("rnn_tanh"),
    "GRU, orthogonal": Network("gru", Recurrent(), line="--"),
    "GRU, default": Network("gru"),
}


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    r"""The norm of the loss's gradient with respect to the input of each time step.

    .. math:: \left\| \frac{\partial L}{\partial x_t} \right\|, \qquad t = 1 \dots T

    taken over the batch, with the cross-entropy as the loss and one pixel a time step.

    Args:
        model: Maps images to logits.
        images: A batch of images, in the model's dtype.
        labels: Their classes.

    Returns:
        One norm for each of the ``T`` pixels.
    """
    images = images.detach().requires_grad_()
    loss = nn.functional.cross_entropy(model(images), labels)
    (gradient,) = torch.autograd.grad(loss, images)
    norms: Tensor = gradient.flatten(1).norm(dim=0)
    return norms


def measure(
    networks: Mapping[str, Network], seeds: Iterable[int], hidden_size: int = 64, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Follow the gradient of freshly initialized networks back from the last pixel of a digit to the first.

    In double precision, since a gradient that has vanished is nothing at all in single precision.

    Args:
        networks: What to measure, by name.
        seeds: Seeds of the weights and the batch. The global random stream is left as it was.
        hidden_size: Units of each network.
        dtype: Precision.

    Returns:
        For each name, the median over the seeds of the gradient norms relative to that of the last pixel: index 0 is
        the last pixel, with the value 1, and index ``T - 1`` the first.
    """
    curves: dict[str, list[Tensor]] = {name: [] for name in networks}
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            data = Digits(BATCH_SIZE, seed)
            data.setup("fit")
            images, labels = next(iter(data.train_dataloader()))
            images = images.to(dtype)
            for name, network in networks.items():
                torch.manual_seed(seed)
                model = network.fresh(images.shape[1:], data.classes, hidden_size).to(dtype)
                norms = gradient_norms(model, images, labels)
                curves[name].append(norms.flip(0) / norms[-1])
    return {name: torch.stack(each).median(dim=0).values for name, each in curves.items()}


def sheet(curves: Mapping[str, Tensor]) -> Sheet:
    """One row a network: what is left of the gradient after all steps, largest first."""
    (steps,) = {len(curve) for curve in curves.values()}
    title = "Gradient with respect to the first pixel, relative to the last, before training"
    rows = Sheet(title, ("network", f"after {steps - 1} steps back"), labels=1)
    for name, curve in _by_end(curves):
        rows.add(name, f"{curve[-1]:.1e}")
    return rows


def draw(curves: Mapping[str, Tensor], path: Path, networks: Mapping[str, Network] = NETWORKS) -> None:
    """Save the curves as a PNG on a logarithmic axis, each labeled where it ends."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", linewidth=0.8)
    for name, curve in curves.items():
        network = networks[name]
        axes.semilogy(curve, color=COLORS[network.cell], linestyle=network.line, linewidth=1.8)
    steps = max(len(curve) for curve in curves.values())
    axes.set_xlim(0, steps - 1)
    axes.set_title("How much of the gradient is left on its way back through time", loc="left", fontweight="bold")
    axes.set_xlabel("time steps back from the last pixel")
    axes.set_ylabel("gradient norm of that step's input, relative to the last step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    ends = _by_end(curves)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = spread([float(to_axes.transform((steps - 1, float(curve[-1])))[1]) for _, curve in ends])
    for (name, curve), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{name}: {curve[-1]:.0e}",
            (steps - 1, float(curve[-1])),
            (1.05, height),
            textcoords="axes fraction",
            color=COLORS[networks[name].cell],
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": COLORS[networks[name].cell],
                "linewidth": 0.8,
                "relpos": (0, 0.5),  # from the middle of the label's left edge
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
    with atomic_path(path) as part:
        figure.savefig(part, dpi=130)


def spread(heights: Sequence[float], gap: float = LABEL_HEIGHT) -> list[float]:
    """Move labels, given from top to bottom, down until each is ``gap`` below the one before.

    Example:
        >>> spread([1.0, 0.75, 0.625], gap=0.25)
        [1.0, 0.75, 0.5]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    return placed


def gradient_through_time(output: Path, seeds: Iterable[int] = range(5)) -> Path:
    """Measure all networks and write ``gradient_through_time.png`` and its table, ``.md``, into ``output``.

    Returns:
        The path of the picture.
    """
    curves = measure(NETWORKS, seeds)
    picture = output / "gradient_through_time.png"
    draw(curves, picture)
    with atomic_path(picture.with_suffix(".md")) as part:
        part.write_text(sheet(curves).markdown(), encoding="utf-8")
    return picture


def _by_end(curves: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(curves.items(), key=lambda item: -float(item[1][-1]))
