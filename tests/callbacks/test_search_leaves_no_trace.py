"""Looking for a cause, and checking an initialization, are invisible whatever `training_step` does besides."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import itertools
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stability_callbacks import FlightRecorder, Initialization, StepGuard
from stability_callbacks.diagnosis import read_incidents
from tests.models import NormNet, assert_same_bits, fit, make_batches, poison

GLOBAL = {"calls": 0}


class Numbers(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


class SideEffect(NormNet):
    """Its loss is scaled by something that each call of the training step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def prepare(self) -> None:
        pass

    def scale(self) -> Any:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = super().loss(batch) * (1 + self.scale() % 7)
        return loss


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def next(self) -> int:
        self.calls += 1
        return self.calls


class Attribute(SideEffect):
    calls = 0

    def scale(self) -> Any:
        self.calls += 1
        return self.calls


class Object(SideEffect):
    def prepare(self) -> None:
        self.counter = Counter()

    def scale(self) -> Any:
        return self.counter.next()


class Nested(SideEffect):
    def prepare(self) -> None:
        self.state = {"a": [[0]]}

    def scale(self) -> Any:
        self.state["a"][0][0] += 1
        return self.state["a"][0][0]


class Global(SideEffect):
    def prepare(self) -> None:
        GLOBAL["calls"] = 0

    def scale(self) -> Any:
        GLOBAL["calls"] += 1
        return GLOBAL["calls"]


class ClassAttribute(SideEffect):
    def prepare(self) -> None:
        type(self).shared = 0  # type: ignore[attr-defined]

    def scale(self) -> Any:
        type(self).shared += 1  # type: ignore[attr-defined]
        return type(self).shared  # type: ignore[attr-defined]


class Iterator(SideEffect):
    def prepare(self) -> None:
        self.iterator = iter(range(12))  # exactly long enough

    def scale(self) -> Any:
        return next(self.iterator)


class Generator(SideEffect):
    def prepare(self) -> None:
        self.generator = (number for number in range(12))

    def scale(self) -> Any:
        return next(self.generator)


class Closure(SideEffect):
    def prepare(self) -> None:
        count = itertools.count()
        self.draw = lambda: next(count)

    def scale(self) -> Any:
        return self.draw()


class Loader(SideEffect):
    workers = 0

    def prepare(self) -> None:
        self.batches = iter(DataLoader(Numbers(), batch_size=4, num_workers=self.workers))

    def scale(self) -> Any:
        return next(self.batches).sum()


class LoaderWithWorkers(Loader):
    workers = 2


class TorchRandom(SideEffect):
    def prepare(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def scale(self) -> Any:
        return torch.rand((), generator=self.generator)


class NumpyRandom(SideEffect):
    def prepare(self) -> None:
        self.generator = np.random.default_rng(0)

    def scale(self) -> Any:
        return self.generator.random()


class PythonRandom(SideEffect):
    def prepare(self) -> None:
        self.generator = random.Random(0)

    def scale(self) -> Any:
        return self.generator.random()


class GlobalRandom(SideEffect):
    def scale(self) -> Any:
        return random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002


class Teacher(SideEffect):
    def prepare(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def teachers(self) -> nn.Module:
        return self.teacher

    def scale(self) -> Any:
        with torch.no_grad():
            for slow, fast in zip(self.teachers().parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast + 1, 0.1)
        return sum(each.sum() for each in self.teachers().parameters())


class HiddenTeacher(Teacher):
    def prepare(self) -> None:
        self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]

    def teachers(self) -> nn.Module:
        return self.hidden[0]


class SharedTensor(SideEffect):
    def prepare(self) -> None:
        self.counter = torch.zeros(()).share_memory_()

    def scale(self) -> Any:
        self.counter += 1
        return self.counter.clone()


class SharedValue(SideEffect):
    def prepare(self) -> None:
        self.value = multiprocessing.Value("i", 0)

    def scale(self) -> Any:
        with self.value.get_lock():
            self.value.value += 1
        return self.value.value


class MappedFile(SideEffect):
    def prepare(self) -> None:
        self.numbers = np.memmap("numbers", mode="w+", shape=1, dtype=np.float32)

    def scale(self) -> Any:
        self.numbers += 1
        self.numbers.flush()
        return float(self.numbers[0])


class ReadFile(SideEffect):
    def prepare(self) -> None:
        Path("lines").write_text("".join(f"{number}\n" for number in range(12)))
        self.lines = Path("lines").open(buffering=1)  # noqa: SIM115

    def scale(self) -> Any:
        return int(self.lines.readline())


class Descriptor(SideEffect):
    def prepare(self) -> None:
        Path("bytes").write_bytes(bytes(range(12)))
        self.descriptor = os.open("bytes", os.O_RDONLY)

    def scale(self) -> Any:
        return os.read(self.descriptor, 1)[0]


class WrittenFile(SideEffect):
    def prepare(self) -> None:
        self.file = Path("written").open("w", buffering=1)  # noqa: SIM115

    def scale(self) -> Any:
        self.file.write("x\n")
        return len(Path("written").read_text())


class AppendedFile(SideEffect):
    def scale(self) -> Any:
        with Path("appended").open("a") as file:
            file.write("x")
        return len(Path("appended").read_text())


class SavedFile(SideEffect):
    def prepare(self) -> None:
        torch.save(torch.zeros(()), "saved.pt")

    def scale(self) -> Any:
        number = torch.load("saved.pt") + 1
        torch.save(number, "saved.pt")
        return number


class Pipe(SideEffect):
    def prepare(self) -> None:
        self.out, into = os.pipe()
        os.write(into, bytes(range(12)))

    def scale(self) -> Any:
        return os.read(self.out, 1)[0]


class TrainerAttribute(SideEffect):
    def scale(self) -> Any:
        self.trainer.calls = getattr(self.trainer, "calls", 0) + 1  # type: ignore[attr-defined]
        return self.trainer.calls  # type: ignore[attr-defined]


class LearningRate(SideEffect):
    def scale(self) -> Any:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.9
        return 1


class Frozen(SideEffect):
    def scale(self) -> Any:
        self.net[0].weight.requires_grad_(not self.net[0].weight.requires_grad)
        return 1


class Unpicklable(Attribute):
    def prepare(self) -> None:
        self.things = [threading.Lock(), lambda: 1, (number for number in range(3))]


class HeldLock(SideEffect):
    """A thread holds the lock whenever the batch is bad, that is while the cause is looked for."""

    calls = 0

    def prepare(self) -> None:
        self.lock = threading.Lock()

    def scale(self) -> Any:
        with self.lock:
            self.calls += 1
        return self.calls

    def on_train_batch_end(self, *_: Any) -> None:
        self.release.set()
        self.holder.join()

    def on_after_backward(self) -> None:
        held, self.release = threading.Event(), threading.Event()

        def hold() -> None:
            with self.lock:
                held.set()
                self.release.wait()

        self.holder = threading.Thread(target=hold)
        self.holder.start()
        held.wait()


def kinds(base: type) -> list[type]:
    found = [each for kind in base.__subclasses__() for each in (kind, *kinds(kind))]
    return sorted(set(found), key=lambda kind: kind.__name__)


def trained(kind: type, callbacks: list[Any], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    directory.mkdir()
    monkeypatch.chdir(directory)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    batches = make_batches(12)
    batches[4], batches[9] = poison(batches[4]), poison(batches[9])
    model = kind()
    trainer = fit(model, batches, callbacks)
    for each in vars(model).values():
        if isinstance(each, io.IOBase):
            each.close()
    files = {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()}
    return dict(model.state_dict()), trainer.global_step, model.losses, files


def test_there_are_many_kinds() -> None:
    assert len(kinds(SideEffect)) >= 25


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", kinds(SideEffect))
def test_a_search_leaves_no_trace(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(kind, [StepGuard()], tmp_path / "plain", monkeypatch)
    record = tmp_path / "record"
    observed = trained(kind, [StepGuard(), FlightRecorder(record)], tmp_path / "observed", monkeypatch)
    assert_same_bits(observed, plain)
    assert observed[1] == 12
    incidents = read_incidents(record / "incidents.jsonl")
    assert [(each.step, each.evidence["phase"]) for each in incidents] == [(4, "input"), (9, "input")]
    with contextlib.suppress(ChildProcessError):  # there may be no child at all
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)  # else a zombie


# A weight that is frozen meanwhile has no gradient to look at, and a pipe's content can't be read in two processes.
NOT_CHECKED = (Frozen, Pipe)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`Initialization\\(check=True\\)` could not check the model")
@pytest.mark.parametrize("kind", [each for each in kinds(SideEffect) if each is not HeldLock])
def test_a_check_leaves_no_trace(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for check in (False, True):
        callback = Initialization(verbose=False, check=check)
        outcomes.append(trained(kind, [callback, StepGuard()], tmp_path / str(check), monkeypatch))
    assert_same_bits(outcomes[1], outcomes[0])
    assert (callback.signal_report is None) == (kind in NOT_CHECKED)


class Violent(NormNet):
    """Ends whatever process runs it twice on one batch."""

    how = "exit"

    def loss(self, batch: Any) -> Tensor:
        if os.getpid() != MAIN:
            if self.how == "exit":
                os._exit(3)
            elif self.how == "fault":
                ctypes.string_at(0)
            signal.pause()
        return super().loss(batch)


MAIN = os.getpid()


@pytest.mark.parametrize(
    ("how", "told"),
    [("exit", "ended with exit code 3"), ("fault", "was ended by SIGSEGV"), ("hang", "did not end within 0.5 s")],
)
def test_a_search_that_crashes_or_hangs_harms_nothing(
    how: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stability_callbacks.callbacks import flight_recorder, initialization

    original = flight_recorder.run_in_fork
    for module in (flight_recorder, initialization):
        monkeypatch.setattr(module, "run_in_fork", lambda work: original(work, timeout=0.5 if how == "hang" else 60.0))
    monkeypatch.setattr(Violent, "how", how)
    monkeypatch.setitem(globals(), "MAIN", os.getpid())
    plain = trained(Violent, [StepGuard()], tmp_path / "plain", monkeypatch)
    callbacks = [StepGuard(), FlightRecorder(tmp_path / "record")]
    assert_same_bits(trained(Violent, callbacks, tmp_path / "observed", monkeypatch), plain)
    first, second = read_incidents(tmp_path / "record" / "incidents.jsonl")
    assert told in str(first.evidence["cause"])
    assert ("an earlier search did not end" if how == "hang" else told) in str(second.evidence["cause"])
    with pytest.warns(UserWarning, match=f"could not check the model.*{told}"):
        trained(Violent, [Initialization(verbose=False, check=True), StepGuard()], tmp_path / "check", monkeypatch)


def test_where_a_process_cannot_be_copied_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    trained(Attribute, [StepGuard(), FlightRecorder(tmp_path / "record")], tmp_path / "run", monkeypatch)
    for incident in read_incidents(tmp_path / "record" / "incidents.jsonl"):
        assert str(incident.evidence["cause"]).startswith("batch[0] held")
