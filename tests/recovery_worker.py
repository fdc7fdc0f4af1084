"""One of the processes that test_recovery_distributed.py lets train together: faults in one of them, and recovery."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor

from stability_callbacks import FlightRecorder, Rollback, StepGuard, TrainingDivergedError
from stability_callbacks.callbacks import flight_recorder
from stability_callbacks.callbacks import rollback as rollback_module
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.diagnosis import Incident, IncidentLog, _bundle
from stability_callbacks.engine import StabilityCallback
from tests.distributed_worker import NAN, OPTIMIZERS, Batch, FaultyModel, Saver, rank, train
from tests.models import OptimizerFactory, ResumableLoader, make_batches, sgd
from tests.process_pair import process_group

Faults = Mapping[int, str]  # by position in the epoch: what the second process's batch brings along

Scenario = Callable[[str, Path], Any]
SCENARIOS: list[tuple[Scenario, tuple[str, ...]]] = []

STORAGES = {"ddp": ("memory", "disk"), "fsdp2": ("memory", "disk", "sharded")}
ON_DISK = {kind: storages[1:] for kind, storages in STORAGES.items()}
ADAMW, FUSED = OPTIMIZERS["adamw"], OPTIMIZERS["fused adamw"]
DECAY = 0.9
GOOD = 8
HIGH_FROM = 70  # when the loss rises; it takes 64 values to tell


def scenario(*kinds: str) -> Callable[[Scenario], Scenario]:
    """Have a function run with some of the strategies."""

    def add(function: Scenario) -> Scenario:
        SCENARIOS.append((function, kinds))
        return function

    return add


def batches(count: int = GOOD, faults: Faults | None = None) -> list[Batch]:
    """This process's batches."""
    faults = (faults or {}) if rank() == 1 else {}
    marked = [(x, y, faults.get(index, "")) for index, (x, y) in enumerate(make_batches(count, seed=rank() or 0))]
    return [(x * 1e4 if fault == "large" else x, y, fault) for x, y, fault in marked]


class Model(FaultyModel):
    """Brings more faults along; its scheduler, if any, multiplies the rate that it finds."""

    def __init__(self, optimizer: OptimizerFactory = sgd, decay: float = 1.0, **arguments: Any) -> None:
        super().__init__(optimizer, **arguments)
        self.decay = decay

    def loss(self, batch: Batch) -> Tensor:
        x, y, fault = batch
        if fault == "log of zero":
            x = (0 * x).log()  # where it breaks
        loss = super().loss((x, y, fault))
        return loss * 100 if fault == "spike" else loss + 100 if fault == "high" else loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.decay == 1:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class MeetingModel(Model):
    """Its forward pass needs all processes."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + 0 * all_reduce(self.net.gain).sum()


class TakesABatchOnce(Model):
    """A second run of a batch fails, in the second process only."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Batch] = []  # kept, so that no later batch is taken for one of them

    def loss(self, batch: Batch) -> Tensor:
        if rank() == 1 and any(batch is each for each in self.taken):
            raise ValueError("this batch is exhausted")
        self.taken.append(batch)
        return super().loss(batch)


class BitFlip(Callback):
    """Makes a number in one process's weights NaN when a batch starts."""

    def __init__(self, *batch_indices: int) -> None:
        self.batch_indices = batch_indices

    @torch.no_grad()
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 1 and batch_idx in self.batch_indices:
            weight = pl_module.net.first.weight
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            local[0, 0] = NAN


class Probe(StabilityCallback):
    """Notes incidents, learning rates, and how many batches a recorder has kept."""

    def __init__(self, recorder: FlightRecorder | None = None) -> None:
        self.incidents: list[Incident] = []
        self.rates: list[float] = []
        self.kept: list[int] = []
        self.recorder = recorder

    def on_incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        if self.recorder is not None:
            self.kept.append(len(self.recorder._pending))


class ReaderOfCounters(Callback):
    """Looks at counters in the first process only, as a progress bar does."""

    def __init__(self, guard: StepGuard, rollback: Rollback, recorder: FlightRecorder) -> None:
        self.guard = guard
        self.rollback = rollback
        self.recorder = recorder

    def on_train_batch_end(self, *arguments: Any) -> None:
        if rank() == 0:
            assert self.guard.skipped_steps + self.rollback.rollbacks + sum(self.recorder.incidents.values()) >= 0


class Fail(Callback):
    """Ends training."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            raise ValueError("the user's code fails")


def rollback(**arguments: Any) -> Rollback:
    return Rollback(**{"every_n_steps": 4, "patience": 2, "lr_factor": 1.0, **arguments})


def stored(kind: str, storage: str, directory: Path, **arguments: Any) -> tuple[Rollback, dict[str, Any]]:
    """A rollback that keeps its snapshots somewhere, and the arguments for the strategy that go with it."""
    callback = rollback(storage="memory" if storage == "memory" else "disk", dirpath=directory / storage, **arguments)
    return callback, {"save_distributed_checkpoint": storage == "sharded"} if kind == "fsdp2" else {}


def run(
    kind: str, data: list[Any], callbacks: list[Callback], build: Callable[[], Any] = Model, **arguments: Any
) -> dict[str, Any]:
    """Train, and tell what the callbacks have seen."""
    recorders = [callback for callback in callbacks if isinstance(callback, FlightRecorder)]
    probe = Probe(*recorders)
    result: dict[str, Any] = {"error": None}
    try:
        result |= train(kind, data, [*callbacks, probe], build, **arguments)
    except (TrainingDivergedError, ValueError) as error:
        result["error"] = str(error)
    return {
        **result,
        "rollbacks": sum(callback.rollbacks for callback in callbacks if isinstance(callback, Rollback)),
        "restored": [int(each.evidence["restored_step"]) for each in probe.incidents if each.kind == "rollback"],
        "told": [(each.rank, each.evidence.get("reason")) for each in probe.incidents if each.kind == "rollback"],
        "counts": [recorder.incidents for recorder in recorders],
        "rates": probe.rates,
        "kept": probe.kept,
    }


@scenario("ddp", "fsdp2")
def bit_flips(kind: str, directory: Path) -> Any:
    """A weight of one process becomes NaN, soon after the start and later on; or it does not."""
    good = batches()
    # Back to the start, to meet all batches anew; then back to where five of them had been met.
    met = [*good[:2], good[0], *good[:6], good[0], *good[5:]]
    results: dict[str, Any] = {"clean": run(kind, good, [], partial(Model, ADAMW))}
    for storage in STORAGES[kind]:
        callback, strategy = stored(kind, storage, directory / kind / "flips")
        common = {"build": partial(Model, ADAMW), "strategy_arguments": strategy}
        results["healed", storage] = run(kind, met, [StepGuard(), callback, BitFlip(2, 9)], **common)
        callback, strategy = stored(kind, storage, directory / kind / "flips")  # what is there is written over
        recorder = FlightRecorder(directory / kind / "flips")
        results["quiet", storage] = run(kind, good, [StepGuard(), callback, recorder], **common)
    return results


@scenario("fsdp2")
def after_validation(kind: str, directory: Path) -> Any:
    """A validation leaves FSDP2 modules with other parameters than the optimizer's."""
    good = batches()[:7]

    def build() -> Model:
        model = Model(ADAMW)
        model.val_dataloader = lambda: ResumableLoader(batches(1))
        return model

    results: dict[str, Any] = {"clean": run(kind, good, [], partial(Model, ADAMW))}
    for storage in STORAGES[kind]:
        callback, strategy = stored(kind, storage, directory / "validation")
        met = [*good[:4], good[0], *good[4:]]  # the snapshot before the validation is used after it
        checkpoint = ModelCheckpoint(directory / f"validated {storage}", filename="{step}", save_top_k=-1)
        callbacks = [StepGuard(), callback, BitFlip(4), checkpoint]
        common = {"strategy_arguments": strategy, "val_check_interval": 4, "enable_checkpointing": True}
        results[storage] = run(kind, met, callbacks, build, **common)
        results[storage]["files"] = names_in(directory / f"validated {storage}")
    return results


@scenario("fsdp2")
def clock(kind: str, directory: Path) -> Any:
    """The rates of a scheduler that multiplies what it finds, with checkpoints that hold the rates of then."""
    results = {}
    for storage in ON_DISK[kind]:
        callback, strategy = stored(kind, storage, directory / "clock")
        build = partial(Model, ADAMW, DECAY)
        common = {"build": build, "strategy_arguments": strategy}
        results[storage] = run(kind, batches(10), [StepGuard(), callback, BitFlip(6)], **common)
    return results


@scenario("fsdp2")
def without_optimizer_state(kind: str, directory: Path) -> Any:
    good, build = batches(), partial(Model, partial(torch.optim.SGD, lr=0.05))
    results: dict[str, Any] = {"clean": run(kind, good, [], build)}
    for storage in ON_DISK[kind]:
        callback, strategy = stored(kind, storage, directory / "stateless")
        common = {"build": build, "strategy_arguments": strategy}
        met = [*good[:6], good[0], *good[4:]]
        results[storage] = run(kind, met, [StepGuard(), callback, BitFlip(6)], **common)
    return results


@scenario("ddp", "fsdp2")
def consecutive_skips(kind: str, directory: Path) -> Any:
    """One process has bad batches in a row; alone, and in windows of two of which one is bad."""
    results = {}
    for accumulate in (1, 2):
        good = batches(GOOD * accumulate)
        bad = batches(2 * accumulate, {0: "gradients", accumulate: "gradients"})
        met = [*good[: 6 * accumulate], *bad, *good[4 * accumulate :]]
        recorder = FlightRecorder(directory / f"{kind} skips {accumulate}", max_bundles=accumulate - 1)
        callbacks = [StepGuard(), rollback(), recorder]
        common = {"build": partial(Model, ADAMW), "accumulate_grad_batches": accumulate}
        results[accumulate] = {
            "healed": run(kind, met, callbacks, **common),
            "clean": run(kind, good, [], **common),
            "record": directory / f"{kind} skips {accumulate}",
        }
    return results


@scenario("ddp", "fsdp2")
def spikes(kind: str, directory: Path) -> Any:
    """A spike in one process's loss, told by the mean of losses that differ; interrupted in between, and not."""
    path = directory / f"{kind} spikes.ckpt"
    results: dict[str, Any] = {}
    for name in ("uninterrupted", "resumed"):
        guard = StepGuard([NonFinite(), Spike(window=8, min_history=4)])
        recorder = FlightRecorder(directory / f"{kind} spikes", max_bundles=2)
        callbacks = [guard, rollback(), recorder]
        # torch.distributed.checkpoint can't load the state of an optimizer that has none for an unused parameter.
        common = {"build": partial(Model, ADAMW, unused_layer=False)}
        data = batches(12, {7: "spike", 10: "spike"})
        if name == "uninterrupted":
            result = run(kind, data, [*callbacks, Saver(path, 8)], **common)
        else:
            result = run(kind, data, callbacks, **common, ckpt_path=str(path))
        learned = [guard.state_dict(), callbacks[1].state_dict()]
        results[name] = {**result, "learned": learned, "record": directory / f"{kind} spikes"}
    return results


@scenario("ddp", "fsdp2")
def sustained_rise(kind: str, directory: Path) -> Any:
    """One process's loss rises and stays up; its gradients do not show it."""
    data = batches(HIGH_FROM + 2, dict.fromkeys(range(HIGH_FROM, HIGH_FROM + 2), "high"))
    return run(kind, data, [StepGuard(), rollback(every_n_steps=20)], log_every_n_steps=50)


@contextlib.contextmanager
def full_disk(only: str = "") -> Iterator[None]:
    """While it lasts, the first process can't write checkpoints, of either form, whose path holds a text."""

    def patched(target: Any, name: str, position: int) -> Any:
        original = getattr(target, name)

        def write(*arguments: Any, **keywords: Any) -> Any:
            place = arguments[position]
            if rank() == 0 and only in str(place.path if isinstance(place, FileSystemWriter) else place):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **keywords)

        return mock.patch.object(target, name, write)

    with patched(torch_io, "_atomic_save", 1), patched(FileSystemWriter, "write_data", 0):
        yield


class Damage(BitFlip):
    """Besides, the first process's part of the newest snapshot is cut off."""

    def __init__(self, *batch_indices: int, directory: Path) -> None:
        super().__init__(*batch_indices)
        self.directory = directory

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if rank() == 0 and batch_idx in self.batch_indices:
            newest = max(self.directory.glob("snapshot*"), key=lambda path: path.stat().st_mtime_ns)
            path = newest if newest.is_file() else next(newest.glob("__0_*.distcp"))
            path.write_bytes(path.read_bytes()[:100])
        torch.distributed.barrier()


@scenario("ddp", "fsdp2")
def snapshots_that_fail(kind: str, directory: Path) -> Any:
    """The snapshot of step 4 can't be written; later, the newest one can't be read."""
    results = {}
    for storage in ON_DISK[kind]:
        callback, strategy = stored(kind, storage, directory / kind / "failing")
        common = {"build": partial(Model, ADAMW), "strategy_arguments": strategy}
        with full_disk("step=4.ckpt"):
            results["unwritten", storage] = run(kind, batches(), [StepGuard(), callback, BitFlip(6)], **common)
        results["unwritten", storage]["files"] = names_in(directory / kind / "failing" / storage)
        callback, strategy = stored(kind, storage, directory / kind / "damaged")
        damage = Damage(9, directory=directory / kind / "damaged" / storage)
        results["damaged", storage] = run(kind, batches(11), [StepGuard(), callback, damage], **common)
    return results


@scenario("ddp", "fsdp2")
def giving_up(kind: str, directory: Path) -> Any:
    results = {}
    for name, disk in (("written", contextlib.nullcontext()), ("unwritten", full_disk("last-good"))):
        storage = "sharded" if kind == "fsdp2" else "memory"
        place = directory / kind / name
        callback, strategy = stored(kind, storage, place, max_rollbacks=1)
        written: list[str] = []
        with disk, counting(written):
            flips = BitFlip(*range(5, 9))
            results[name] = run(kind, batches(), [StepGuard(), callback, flips], strategy_arguments=strategy)
        results[name] |= {"written": written, "files": names_in(place / storage), "place": place / storage}
    return results


def counting(written: list[str]) -> Any:
    """While it lasts, the last good states that a rollback writes are listed."""
    original = rollback_module.write_checkpoint

    def write(trainer: pl.Trainer, path: Path) -> None:
        written.append(path.name)
        original(trainer, path)

    return mock.patch.object(rollback_module, "write_checkpoint", write)


def names_in(directory: Path) -> list[str]:
    torch.distributed.barrier()
    return sorted(path.name for path in directory.glob("*"))


@scenario("ddp", "fsdp2")
def checkpoint_gate(kind: str, directory: Path) -> Any:
    """A weight of one process becomes NaN and stays so."""
    results = {}
    for name, flip in (("later", 4), ("from the start", 0), ("failing", 0)):
        place = directory / f"{kind} gate {name}"
        checkpoint = ModelCheckpoint(
            place, filename="{step}", every_n_train_steps=1, save_last=True, save_on_exception=True
        )
        more = [Fail(3)] if name == "failing" else []
        callbacks = [
            StepGuard(),
            BitFlip(flip),
            FlightRecorder(place / "record", trace=False, max_bundles=0),
            *more,
            checkpoint,
        ]
        common = {"strategy_arguments": {} if kind == "ddp" else {"save_distributed_checkpoint": False}}
        result = run(kind, batches(), callbacks, enable_checkpointing=True, **common)
        best = (Path(checkpoint.best_model_path).name, Path(checkpoint.last_model_path).name)
        gated = [name for name, value in vars(checkpoint).items() if name.startswith("_save_") and callable(value)]
        results[name] = {**result, "best": best, "left": gated, "place": place, "files": names_in(place)}
    return results


@scenario("ddp", "fsdp2")
def record(kind: str, directory: Path) -> Any:
    """Faults in one process's batches, told by the recorder; with a verdict that the host knows, and without."""
    faults = {2: "log of zero", 3: "large", 5: "buffer", 6: "loss", 7: "gradients"}
    results = {}
    for name, optimizer in {"known": ADAMW, "on the device": FUSED}.items():
        guard = StepGuard([NonFinite(), InputRange(1e3)])
        net, back = rollback(every_n_steps=100, patience=5), FlightRecorder(directory / f"{kind} record {name}")
        common = {"build": partial(Model, optimizer), "log_every_n_steps": 1 if name == "known" else 4}
        reader = ReaderOfCounters(guard, net, back)
        result = run(kind, batches(12, faults), [guard, net, back, reader], **common)
        results[name] = {**result, "record": directory / f"{kind} record {name}"}
    guard = StepGuard([NonFinite(), InputRange(1e3)])
    results["nobody records"] = run(kind, batches(12, faults), [guard], partial(Model, ADAMW))
    return results


@scenario("ddp")
def step_that_needs_all(kind: str, directory: Path) -> Any:
    """A fault that one process alone votes against, in a model whose processes meet in the forward pass."""
    place = directory / "meeting"
    data = batches(faults={3: "buffer", 5: "log of zero"})
    return {**run(kind, data, [StepGuard(), FlightRecorder(place)], MeetingModel), "record": place}


@scenario("ddp")
def recorder_that_fails(kind: str, directory: Path) -> Any:
    """In one process the second run raises, in one no bundle can be written, in one no line."""
    place, original = directory / "hostile", flight_recorder.write_bundle

    def write_bundle(*arguments: Any, **keywords: Any) -> Path:
        if rank() == 1:
            torch.save(torch.zeros(2), "/dev/full")
        return original(*arguments, **keywords)

    def append(log: IncidentLog, incident: Incident) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data, results = batches(faults={3: "log of zero", 5: "gradients"}), {}
    with mock.patch.object(flight_recorder, "write_bundle", write_bundle):
        results["bundle"] = run(kind, data, [StepGuard(), FlightRecorder(place)], TakesABatchOnce)
    with mock.patch.object(IncidentLog, "append", append):
        results["line"] = run(kind, data, [StepGuard(), FlightRecorder(directory / "lines")], TakesABatchOnce)
    return {**results, "record": place}


@scenario("ddp")
def failure_of_the_user(kind: str, directory: Path) -> Any:
    """An exception in the user's code, maybe in one process only, while a skip lies on the device."""
    meetings: list[Any] = []
    original = torch.distributed.all_gather_object

    def meet(gathered: list[Any], told: Any) -> None:
        meetings.append(told)
        original(gathered, told)

    guards = [StepGuard(), rollback(every_n_steps=100), FlightRecorder(directory / "failure")]
    with mock.patch.object(torch.distributed, "all_gather_object", meet):
        data = batches(faults={3: "gradients"})
        result = run(kind, data, [*guards, Fail(5)], partial(Model, FUSED), log_every_n_steps=50)
    return {**result, "meetings": len(meetings), "record": directory / "failure"}


@scenario("ddp")
def memory_budget(kind: str, directory: Path) -> Any:
    """The processes may take different amounts of memory."""
    rings = {}

    class Kept(Callback):
        def on_train_end(self, *arguments: Any) -> None:
            rings[budget] = (type(callback._ring).__name__, getattr(callback._ring, "keep", None))

    for budget in (10**5, 100):
        budgets = (10**9, budget)
        callback = rollback(keep=10**6, dirpath=directory / "budget", max_memory=budgets[rank() or 0])
        run(kind, batches(1), [callback, Kept()])
    return rings


def main(rank: int, directory: Path, *names: str) -> None:
    """Run all scenarios, or those named, with all strategies."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with process_group(rank, directory), mock.patch.object(_bundle, "plot_history"):  # pictures take long
        for run_scenario, kinds in SCENARIOS:
            for kind in kinds if not names or run_scenario.__name__ in names else ():
                torch.save(run_scenario(kind, directory), directory / f"{run_scenario.__name__} {kind} {rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
