"""What a snapshot costs, as a ratio to a plain copy of the same bytes: ``python -m benchmarks.snapshot --help``.

Snapshots of a network and its AdamW state and plain grouped copies of the same tensors take turns, so that a busy
moment of the machine hits both alike; each is compared with the plain copy of the same turn. All write to two sets of
tensors in turn. On the CPU the time is that which the thread had a processor for; on a GPU it is the wall's, until the
copies have arrived in page-locked host memory. The interval holds 90 % of the median's bootstrap distribution.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks._models import MODELS
from stability_callbacks.gradient_pass import group_by_device_and_dtype
from stability_callbacks.snapshots import SnapshotRing

_KEEP = 2
_WARM_UP_TURNS = 2 * _KEEP
_RESAMPLES = 1000


def main() -> None:
    """Measure, print a table, and write the figures as JSON where asked."""
    arguments = _parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures = {model: _measure(model, arguments) for model in arguments.models}
    for model, arms in figures.items():
        _print(model, arms)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**_machine(arguments), "figures": figures}, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["transformer-1m", "transformer-10m"])
    parser.add_argument("--turns", type=int, default=60, help="number of times that each is timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0 for torch's default")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def _measure(model: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    make_net, make_batch, _ = MODELS[model]
    net = make_net().to(arguments.device)
    x, y = (each.to(arguments.device) for each in make_batch(1))
    optimizer = torch.optim.AdamW(net.parameters())
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    ring = SnapshotRing(net, optimizer, keep=_KEEP)
    tensors = _tensors(net, optimizer)
    arms: dict[str, Callable[[], object]] = {
        "plain copy": _plain_copy(tensors),
        "plain copy again (noise floor)": _plain_copy(tensors),
        "SnapshotRing.take": lambda: ring.take(0),
        "SnapshotRing.restore": ring.restore,
        "SnapshotRing.finite": ring.finite,
    }
    clock = time.perf_counter if arguments.device == "cuda" else time.thread_time
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_WARM_UP_TURNS + arguments.turns):
        for name, work in arms.items():
            _synchronize()
            start = clock()
            work()
            _synchronize()
            seconds[name].append(clock() - start)
    seconds = {name: times[_WARM_UP_TURNS:] for name, times in seconds.items()}
    size = {"bytes": sum(tensor.nbytes for tensor in tensors), "tensors": len(tensors)}
    if size["bytes"] != ring.nbytes:
        raise RuntimeError(f"the plain copy has {size['bytes']} bytes and the snapshot {ring.nbytes}")
    return {name: {**size, **_ratio(times, seconds["plain copy"])} for name, times in seconds.items()}


def _tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    return [tensor.detach() for tensor in [*net.parameters(), *net.buffers(), *state]]


def _plain_copy(tensors: list[Tensor]) -> Callable[[], None]:
    """Copies to tensors that exist already, in groups that are known already."""
    groups = [
        [tensors[index] for index in members] for members in group_by_device_and_dtype(tensors).values() if members
    ]
    targets = cycle(
        [
            [[torch.empty_like(each, device="cpu", pin_memory=each.is_cuda) for each in group] for group in groups]
            for _ in range(_KEEP)
        ]
    )

    def copy() -> None:
        for group, target in zip(groups, next(targets), strict=True):
            torch._foreach_copy_(target, group, non_blocking=True)

    return copy


def _ratio(times: list[float], plain: list[float]) -> dict[str, float]:
    """Time relative to the plain copy's in the same turn: the median, with a bootstrap interval of it."""
    ratios = [time / other for time, other in zip(times, plain, strict=True)]
    generator = random.Random(0)
    resampled = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return {
        "ms": 1e3 * statistics.median(times),
        "ratio": statistics.median(ratios),
        "low": resampled[_RESAMPLES // 20],
        "high": resampled[-_RESAMPLES // 20],
    }


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "arguments": vars(arguments),
    }


def _print(model: str, arms: dict[str, dict[str, float]]) -> None:
    first = next(iter(arms.values()))
    table = Table(title=f"{model}: {first['bytes'] / 1e6:.1f} MB in {first['tensors']:.0f} tensors")
    table.add_column("arm")
    for column in ("ms", "ratio to plain", "90 % interval"):
        table.add_column(column, justify="right")
    for name, figures in arms.items():
        interval = f"{figures['low']:.3f} - {figures['high']:.3f}"
        table.add_row(name, f"{figures['ms']:.2f}", f"{figures['ratio']:.3f}", interval)
    Console(width=100).print(table)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
