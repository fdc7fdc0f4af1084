"""What each clip rule, schedule and initialization costs: ``python -m benchmarks.policies --help``.

A rule is timed as it runs inside the callback: with the gradients' norms given. Its time is compared with that of one
measurement of the gradients and that of one AdamW step, in the same turn: all take turns, so that a busy moment of the
machine hits all alike. The interval holds 90 % of the ratio's bootstrap distribution over the turns.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks._models import MODELS
from stability_callbacks.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    ClipRule,
    NormClip,
    OutlierClip,
    PerGroup,
    ValueClip,
    ZClip,
)
from stability_callbacks.gradient_pass import GradientNorms, NamedParameters, measure_gradients
from stability_callbacks.initialization import (
    Auto,
    DepthScaled,
    Kaiming,
    Normal,
    Orthogonal,
    Policy,
    TruncNormal,
    Xavier,
    ZeroResidual,
)
from stability_callbacks.schedules import (
    Scaled,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)

_WARM_UP_TURNS = 3
_RESAMPLES = 1000

_RULES: list[ClipRule] = [
    NormClip(),
    NormClip(WarmupLinear(warmup=0, end=0.5, total_steps=100)),
    ValueClip(max_value=1.0),
    AGC(exclude_last_layer=True),
    AutoClip(),
    ZClip(),
    OutlierClip(),
    AdaGC(),
    PerGroup({"bias": None, ".*": NormClip()}),
]
_SCHEDULES: list[Schedule] = [
    WarmupCosine(),
    WarmupLinear(),
    WarmupStableDecay(),
    WarmupInverseSqrt(),
    WarmupConstant(),
    Scaled(WarmupCosine(), 2.0),
]
_POLICIES: list[Policy] = [
    Auto(),
    Xavier(),
    Kaiming(),
    Orthogonal(),
    Normal(std=0.02),
    TruncNormal(std=0.02),
    DepthScaled(),
    ZeroResidual(Auto()),
]


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("``")[0].strip(" :"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["transformer-1m", "transformer-10m"])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0 for torch's default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for model in arguments.models:
        _print_rules(model, arguments.turns)
    _print_schedules()
    _print_policies(arguments.models[0])


def _print_rules(model: str, turns: int) -> None:
    net = MODELS[model][0]()
    pairs = NamedParameters(net.named_parameters())
    gradients = [torch.randn_like(parameter) * 1e-3 for _, parameter in pairs]
    for (_, parameter), gradient in zip(pairs, gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    rules = copy.deepcopy(_RULES)
    tasks: list[Callable[[GradientNorms], object]] = [lambda _: measure_gradients(pairs), lambda _: optimizer.step()]
    tasks += [partial(rule.clip_, pairs) for rule in rules]
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(_WARM_UP_TURNS + turns):
        norms = measure_gradients(pairs)
        for task, times in zip(tasks, seconds, strict=True):
            start = time.thread_time()
            task(norms)
            times.append(time.thread_time() - start)
        for gradient in gradients:
            gradient.normal_(std=1e-3)
    measuring, stepping, *clipping = (times[_WARM_UP_TURNS:] for times in seconds)
    parameters = sum(parameter.numel() for _, parameter in pairs)
    table = Table(title=f"{model}, {parameters / 1e6:.1f} M parameters in {len(pairs)} tensors")
    table.add_column("rule")
    for column in ("ms", "of a measurement", "90 % interval", "of an AdamW step"):
        table.add_column(column, justify="right")
    names = ["(measurement)", *map(_short_name, rules)]
    for name, times in zip(names, [measuring, *clipping], strict=True):
        ratio, low, high = _ratio(times, measuring)
        table.add_row(
            name,
            f"{1e3 * statistics.median(times):.2f}",
            f"{ratio:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{_ratio(times, stepping)[0]:.3f}",
        )
    Console(width=110).print(table)


def _print_schedules() -> None:
    table = Table(title="one call of a schedule")
    table.add_column("schedule")
    table.add_column("µs", justify="right")
    for schedule in _SCHEDULES:
        calls = 5000
        runs = timeit.repeat(partial(schedule, 700, 1000), timer=time.thread_time, number=calls, repeat=7)
        table.add_row(_short_name(schedule), f"{1e6 * min(runs) / calls:.1f}")
    Console(width=110).print(table)


def _print_policies(model: str) -> None:
    make_net = MODELS[model][0]
    table = Table(title=f"one initialization of {model}")
    table.add_column("policy")
    table.add_column("ms", justify="right")
    for policy in _POLICIES:
        nets: list[nn.Module] = [make_net() for _ in range(3)]
        times = []
        for net in nets:
            start = time.thread_time()
            policy.apply(net)
            times.append(time.thread_time() - start)
        table.add_row(_short_name(policy), f"{1e3 * statistics.median(times):.0f}")
    Console(width=110).print(table)


def _ratio(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios turn by turn, with its bootstrap interval."""
    ratios = [one / other for one, other in zip(times, reference, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return statistics.median(ratios), medians[_RESAMPLES // 20], medians[-_RESAMPLES // 20]


def _short_name(policy: object) -> str:
    scheduled = isinstance(policy, ClipRule) and policy.schedules
    return type(policy).__name__ + (", scheduled" if scheduled else "")


if __name__ == "__main__":
    main()
