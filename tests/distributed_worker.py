"""One of the processes that test_distributed.py lets train together: runs all scenarios and saves the results."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from stability_callbacks import (
    GradientClipping,
    GradientMonitor,
    Initialization,
    LRSchedule,
    StepGuard,
    TrainingDivergedError,
)
from stability_callbacks.clipping import NormClip, ValueClip
from stability_callbacks.engine import OptimizerStep, StabilityCallback
from stability_callbacks.schedules import WarmupCosine
from tests.models import (
    OptimizerFactory,
    ResumableLoader,
    SparseNet,
    TiedNet,
    TinyModel,
    TwoOptimizers,
    fit,
    make_batches,
    sgd,
    training_state,
)
from tests.process_pair import PROCESSES, process_group

Batch = tuple[Tensor, Tensor, str]
Faults = Mapping[int, tuple[int, str]]  # by position in the epoch: the rank that has the fault, and where it is

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "ddp": partial(DDPStrategy, process_group_backend="gloo", find_unused_parameters=True),
    "fsdp2": partial(ModelParallelStrategy, data_parallel_size=PROCESSES, tensor_parallel_size=1),
    "tensor parallel": partial(ModelParallelStrategy, data_parallel_size=1, tensor_parallel_size=PROCESSES),
}
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": sgd,
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "fused adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "fused sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
}
WITHOUT_SHARDED_KERNEL = {"fused sgd"}
GOOD_BATCHES = 8
# The first batch and the last one, each kind of fault, each rank.
FAULTS = {
    0: (1, "gradients"),
    3: (0, "loss"),
    4: (1, "loss"),
    7: (1, "buffer"),
    11: (0, "buffer"),
    13: (0, "gradients"),
}
SAVED_AFTER = 4
# The form of the checkpoint, and the place of the callback that saves it in the list.
SAVERS = {"ddp": (("whole", "first"), ("whole", "last")), "fsdp2": (("sharded", "first"), ("whole", "last"))}
NAN = float("nan")

Scenario = Callable[[str, Path], Any]
SCENARIOS: list[tuple[Scenario, tuple[str, ...]]] = []


def scenario(*kinds: str) -> Callable[[Scenario], Scenario]:
    """Have a function run with some of the strategies."""

    def add(function: Scenario) -> Scenario:
        SCENARIOS.append((function, kinds))
        return function

    return add


def rank() -> int | None:
    """This process's rank; None in the process that trains alone on the batches of all."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else None


def batches(faults: Faults | None = None) -> list[Batch]:
    """This process's good batches, with bad ones put in between."""
    if rank() is None:
        shares = zip(*(make_batches(GOOD_BATCHES, seed) for seed in range(PROCESSES)), strict=True)
        return [(torch.cat([x for x, _ in share]), torch.cat([y for _, y in share]), "") for share in shares]
    good = [(x, y, "") for x, y in make_batches(GOOD_BATCHES, seed=rank() or 0)]
    all_batches = list(good)
    for position, (faulty_rank, fault) in (faults or {}).items():
        x, y, _ = good[0]
        all_batches.insert(position, (2 * x, y, fault if rank() == faulty_rank else ""))
    return all_batches


class Net(nn.Module):
    """Statistics that differ between processes, an unused layer, and a parameter with fewer elements than processes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = norm
        self.last = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("mean_input", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean_input.lerp_(x.detach().mean(), 0.1)
        return self.last(self.norm(self.first(x)).tanh()) * self.gain


class FaultyModel(TinyModel):
    """Sharded if the strategy asks for it. A batch can bring a fault along: in its gradients, its loss, or a buffer."""

    def __init__(self, optimizer: OptimizerFactory = sgd, batch_norm: bool = True, unused_layer: bool = True) -> None:
        super().__init__(optimizer)
        self.net = Net(nn.BatchNorm1d(8) if batch_norm else nn.Identity())
        self.net.unused.requires_grad_(unused_layer)

    def configure_model(self) -> None:
        torch.manual_seed(rank() or 0)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.first, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def loss(self, batch: Batch) -> Tensor:
        x, y, fault = batch
        loss = nn.functional.cross_entropy(self.net(x * NAN if fault == "gradients" else x), y)
        if fault == "buffer":
            self.net.mean_input.fill_(NAN)
        return loss + NAN if fault == "loss" else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch)


class TensorParallelModel(TinyModel):
    """Some parameters sharded, some not, and by sequence parallelism two whose gradients come as partial sums."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        )

    def configure_model(self) -> None:
        plan = {
            "0": ColwiseParallel(),
            "2": RowwiseParallel(output_layouts=Shard(0)),
            "3": SequenceParallel(sequence_dim=0),
            "4": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        }
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


class MemoryLogger(Logger):
    """Keeps the metrics that it is given, on every process."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int | None, dict[str, Tensor]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = self.metrics.setdefault(step, {})
        row.update({name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Saver(pl.Callback):
    """Saves a checkpoint at the end of a batch."""

    def __init__(self, path: Path, batch_idx: int) -> None:
        self.path = path
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            trainer.save_checkpoint(self.path)


class StateReader(pl.Callback):
    """Asks torch for the optimizer's state at the end of the first batch, without Lightning's knowledge."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            get_optimizer_state_dict(module, trainer.optimizers[0])


class VerdictProbe(StabilityCallback):
    """Notes which verdicts the host knew when the update was made."""

    def __init__(self) -> None:
        self.verdicts: list[bool | None] = []

    def after_update(self, step: OptimizerStep) -> None:
        self.verdicts.append(step.skipped)


def clipping() -> GradientClipping:
    return GradientClipping([NormClip(0.3), ValueClip(0.05)])


def suite() -> list[pl.Callback]:
    return [LRSchedule(WarmupCosine(warmup=3)), GradientMonitor(), clipping(), StepGuard()]


def whole(state: Any) -> Any:
    """A state with every sharded tensor put together."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def train(
    kind: str,
    data: list[Any],
    callbacks: list[pl.Callback],
    build: Callable[[], pl.LightningModule] = FaultyModel,
    loggers: list[Logger] | None = None,
    strategy_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    if kind in STRATEGIES:
        strategy = STRATEGIES[kind](**(strategy_arguments or {}))
        arguments = {"strategy": strategy, "devices": PROCESSES, **arguments}
    memory = MemoryLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build()
        trainer = fit(model, data, callbacks, logger=[memory, *(loggers or [])], **arguments)
    return {
        "state": whole(training_state(model, trainer)),
        "metrics": memory.metrics,
        "skipped": sum(callback.skipped_steps for callback in callbacks if isinstance(callback, StepGuard)),
        "warnings": [str(warning.message) for warning in caught],
    }


@scenario("ddp", "fsdp2")
def whole_suite(kind: str, directory: Path) -> Any:
    """The whole suite, after a validation, on a net whose gradients do not depend on how the batch is shared out."""

    def build() -> FaultyModel:
        model = FaultyModel(batch_norm=False)
        model.val_dataloader = lambda: ResumableLoader(batches()[:1])
        return model

    tensorboard = TensorBoardLogger(directory, name=f"tensorboard {kind}", version="")
    return train(kind, batches(), [Initialization(verbose=False), *suite()], build, [tensorboard])


@scenario("ddp", "fsdp2")
def observers(kind: str, directory: Path) -> Any:
    return {
        "with": train(kind, batches(), [GradientMonitor(), StepGuard()]),
        "without": train(kind, batches(), []),
    }


@scenario("ddp", "fsdp2")
def faults(kind: str, directory: Path) -> Any:
    """The same run with and without bad batches."""

    def compare(build: Callable[[], Any], good: list[Any], bad: list[Any], **arguments: Any) -> Any:
        probe = VerdictProbe()
        faulty = train(kind, bad, [clipping(), StepGuard(), GradientMonitor(), probe], build, **arguments)
        return {
            "faulty": faulty,
            "clean": train(kind, good, [clipping()], build, **arguments),
            "verdicts": probe.verdicts,
        }

    results = {
        name: compare(partial(FaultyModel, optimizer), batches(), batches(FAULTS))
        for name, optimizer in OPTIMIZERS.items()
        if kind != "fsdp2" or name not in WITHOUT_SHARDED_KERNEL
    }
    results["bf16-mixed"] = compare(FaultyModel, batches(), batches(FAULTS), precision="bf16-mixed")
    # The second window of two is bad, by its second micro-batch.
    bad_window = batches({2: (0, ""), 3: (1, "gradients")})
    results["accumulation"] = compare(FaultyModel, batches(), bad_window, accumulate_grad_batches=2)
    if kind == "ddp":
        good = [(x, y) for x, y, _ in batches()]
        bad = [(x * NAN if fault else x, y) for x, y, fault in batches(FAULTS)]
        for model in (TwoOptimizers, SparseNet, TiedNet):
            results[model.__name__] = compare(model, good, bad)
    return results


@scenario("ddp", "fsdp2")
def divergence(kind: str, directory: Path) -> Any:
    """What each process is told in the end; with the fused optimizer that comes at a log step."""

    def diverge(optimizer: str, log_every_n_steps: int) -> str | None:
        bad = batches(dict.fromkeys(range(2, 6), (1, "loss")))
        build = partial(FaultyModel, OPTIMIZERS[optimizer])
        try:
            train(kind, bad, [StepGuard(max_consecutive_skips=2)], build, log_every_n_steps=log_every_n_steps)
        except TrainingDivergedError as error:
            return str(error)
        return None

    return {"sgd": diverge("sgd", 1), "fused adamw": diverge("fused adamw", 3)}


@scenario("ddp", "fsdp2")
def resume(kind: str, directory: Path) -> Any:
    """Training with a checkpoint in the middle, and training resumed from that."""
    results = {}
    for form, place in SAVERS[kind]:
        arguments = {"save_distributed_checkpoint": form == "sharded"} if kind == "fsdp2" else {}
        # torch.distributed.checkpoint cannot load the state of an optimizer that has none for an unused parameter.
        build = partial(FaultyModel, OPTIMIZERS["adamw"], unused_layer=False)
        run = partial(train, kind, batches(FAULTS), build=build, strategy_arguments=arguments)
        path = directory / f"{kind} {form} {place}.ckpt"
        saver = Saver(path, SAVED_AFTER)
        results[form, place] = {
            "checkpoint": path,
            "uninterrupted": run(callbacks=[saver, *suite()] if place == "first" else [*suite(), saver]),
            "resumed": run(callbacks=suite(), ckpt_path=str(path)),
        }
    return results


@scenario("ddp", "fsdp2")
def checkpoint_before_any_state(kind: str, directory: Path) -> Any:
    """To read an optimizer without state and gradients, torch.distributed.checkpoint calls its `step()`."""
    build = partial(FaultyModel, partial(torch.optim.SGD, lr=0.05))
    saver = Saver(directory / f"{kind} stateless.ckpt", 0)
    run = partial(train, kind, batches({0: (1, "gradients")}), build=build)
    return {
        "saved first": run(callbacks=[saver, *suite()]),
        "saved last": run(callbacks=[*suite(), saver]),
        "read first": run(callbacks=[StateReader(), *suite()]),
        "never": run(callbacks=suite()),
    }


@scenario("tensor parallel")
def parts_of_layers(kind: str, directory: Path) -> Any:
    """The suite where all processes get the same batches, and each has a part of each layer."""
    run = partial(train, kind, make_batches(GOOD_BATCHES), build=TensorParallelModel)
    monitor = GradientMonitor(updates=False)
    return {
        "suite": run([monitor, clipping(), StepGuard()]),
        "observers": run([monitor, StepGuard()]),
        "nothing": run([]),
    }


def main(rank: int, directory: Path) -> None:
    """Run all scenarios with all strategies."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with process_group(rank, directory):
        for run, kinds in SCENARIOS:
            for kind in kinds:
                torch.save(run(kind, directory), directory / f"{run.__name__} {kind} {rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
