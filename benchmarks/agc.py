"""Whether AGC holds training back: ``python -m benchmarks.agc --help``.

A small convolutional network, with batch normalization and without, learns 8x8 digits by SGD with momentum 0.9 in 15
epochs of 22 steps. Printed is the accuracy on the validation part, as the mean over three seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stability_callbacks.clipping import AGC, ClipRule, NormClip

_EPOCHS = 15
_SEEDS = 3

ARMS: dict[str, Callable[[], list[ClipRule]]] = {
    "nothing": list,
    "NormClip(1)": lambda: [NormClip(1.0)],
    "AGC(0.01)": lambda: [AGC(exclude_last_layer=True)],
    "AGC(0.1)": lambda: [AGC(clip=0.1, exclude_last_layer=True)],
    "AGC(0.01), NormClip(1)": lambda: [AGC(exclude_last_layer=True), NormClip(1.0)],
}


def main() -> None:
    """Train with each arm at each learning rate, and print the accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("``")[0].strip(" :"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.1, 0.5, 1.0])
    parser.add_argument("--adamw", action="store_true", help="by AdamW instead of SGD")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits = _digits()
    table = Table(title="accuracy after training")
    for column in ("normalized", "learning rate", *arguments.arms):
        table.add_column(column, justify="right")
    for normalized in (True, False):
        for rate in arguments.rates:
            accuracies = [
                statistics.fmean(
                    _accuracy(digits, normalized, rate, ARMS[arm](), seed, arguments.adamw) for seed in range(_SEEDS)
                )
                for arm in arguments.arms
            ]
            table.add_row("yes" if normalized else "no", f"{rate:g}", *(f"{each:.3f}" for each in accuracies))
    Console(width=110).print(table)


def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target)[order]


def _net(normalized: bool, width: int = 16) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for index in range(6):
        layers.append(nn.Conv2d(channels, width, 3, padding=1, stride=2 if index == 2 else 1))
        layers += [nn.BatchNorm2d(width)] if normalized else []
        layers.append(nn.ReLU())
        channels = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    for layer in net if not normalized else ():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def _accuracy(
    digits: tuple[Tensor, Tensor], normalized: bool, rate: float, rules: list[ClipRule], seed: int, adamw: bool
) -> float:
    torch.manual_seed(seed)
    (x, x_held_out), (y, y_held_out) = (values.split([1400, len(values) - 1400]) for values in digits)
    net = _net(normalized)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    if adamw:
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            for rule in rules:
                rule.clip_(net.named_parameters())
            optimizer.step()
    net.eval()
    with torch.no_grad():
        right = net(x_held_out).argmax(1) == y_held_out
    return float(right.float().mean())


if __name__ == "__main__":
    main()
