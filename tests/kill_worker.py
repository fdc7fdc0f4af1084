"""Trains in a process that is killed again and again, and lets it go on; started by test_kill.py.

A process takes seconds to import torch and Lightning, so one does that and forks those that train. Each kills itself at
an instruction that was drawn beforehand: where it dies depends on no clock and on no other process.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from stability_callbacks import (
    FaultInjector,
    FlightRecorder,
    GradientClipping,
    LRSchedule,
    Rollback,
    StepGuard,
    newest_readable_checkpoint,
)
from stability_callbacks.clipping import ZClip
from stability_callbacks.detection import InputRange, NonFinite, Spike
from stability_callbacks.faults import Fault
from stability_callbacks.schedules import WarmupCosine
from tests.models import TinyModel, loader_of, make_batches, make_trainer

KILLS = 20
STEPS = 150
BATCHES_PER_EPOCH = 40
CHECKPOINT_EVERY = 3
EPOCH_END = 120  # the only one at which a checkpoint is due
CALLS = 40_000  # of Python and C: in a step that writes a checkpoint and a snapshot; others have a tenth

# The snapshot that a rollback goes back to is taken in the step of a checkpoint: a resumed run begins with one too.
FAULTS = [
    Fault("input", "nan", steps=[10, 52, 100]),
    Fault("gradient", "inf", steps=[28, 118]),
    Fault("loss", 1e6, steps=[61, 109]),
    Fault("weight", "nan", steps=[37, 91]),
    Fault("optimizer_state", "inf", steps=[73, 130]),
]

SKIPS = 9
ROLLBACKS = 4

LAST = Path("checkpoints", "last.ckpt")
RUNS = ("uninterrupted", "killed")

# What a process tells the one that forked it.
STEP, IN_WRITE = b"s", b"w"


class DropoutNet(TinyModel):
    """Batch normalization and dropout: buffers, and random numbers in each step."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


class RandomStateKeeper(Callback):
    """Saves the random state, as Lightning's checkpoints do not, and tells of each step; one of them is the last."""

    def __init__(self, tell: Callable[[bytes], None], fatal: Fatality) -> None:
        self.tell = tell
        self.fatal = fatal
        self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.tell(STEP)
        if self.steps == self.fatal.step:
            die_in_call(self.fatal.call)

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])


class PiecewiseIO(TorchCheckpointIO):
    """Writes a checkpoint bit by bit to where it belongs, as over a network; one of them is never completed."""

    def __init__(self, tell: Callable[[bytes], None], fatal: Fatality) -> None:
        super().__init__()
        self.tell = tell
        self.fatal = fatal
        self.writes = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.writes += 1
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        whole = content.getvalue()
        with Path(path).open("wb", buffering=0) as file:
            if self.writes == self.fatal.write:
                file.write(whole[: int(self.fatal.fraction * len(whole))])
                self.tell(IN_WRITE)
                die()
            file.writelines(whole[start : start + 8192] for start in range(0, len(whole), 8192))


class Fatality(NamedTuple):
    """When a process dies: in its n-th write of a checkpoint, some calls after the start of its n-th step, or trained.

    At the end, training is over, the last checkpoint is complete, and the process has yet to leave.
    """

    write: int = 0
    fraction: float = 0.0
    step: int = 0
    call: int = 0
    at_end: bool = False


def draw_fatality(number: int, begun_at: int) -> Fatality:
    """Every other kill hits a write; each life is long enough to get to the next checkpoint most times."""
    stream = random.Random(number)
    if 0 < EPOCH_END - begun_at < 18:
        return Fatality(step=EPOCH_END - begun_at + 1, call=1)  # the next life begins where an epoch ends
    if number % 2:
        return Fatality(write=stream.randrange(1, 16), fraction=stream.random())
    return Fatality(step=stream.randrange(2, 18), call=stream.randrange(1, CALLS))


def die() -> None:
    """Be killed, here and now: nothing is flushed, closed or told."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_call(number: int) -> None:
    """Be killed in the n-th call from now on, whether of Python or of C."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls == number:
            die()

    sys.setprofile(count)


def train(tell: Callable[[bytes], None], fatal: Fatality) -> None:
    """Train from the newest checkpoint that can be read, or from the start, to the end."""
    torch.manual_seed(0)
    checkpoint = newest_readable_checkpoint("checkpoints")
    callbacks = [
        ModelCheckpoint("checkpoints", every_n_train_steps=CHECKPOINT_EVERY, save_last=True),
        RandomStateKeeper(tell, fatal),
        FaultInjector(FAULTS),
        StepGuard([NonFinite(), Spike(window=16, min_history=8), InputRange(50)]),
        Rollback(CHECKPOINT_EVERY, patience=2, lr_recovery_steps=10, storage="disk", dirpath="rollback"),
        GradientClipping(ZClip(warmup_steps=5)),
        LRSchedule(WarmupCosine(warmup=10, total_steps=STEPS)),
        FlightRecorder("record", history=16, max_bundles=1),
    ]
    trainer = make_trainer(
        callbacks,
        plugins=[PiecewiseIO(tell, fatal)],
        max_steps=STEPS,
        max_epochs=-1,
        enable_checkpointing=True,
        log_every_n_steps=5,
    )
    with redirect_stdout(io.StringIO()):  # the recorder's table
        trainer.fit(DropoutNet(), loader_of(make_batches(BATCHES_PER_EPOCH)), ckpt_path=checkpoint)


def steps_saved(directory: Path) -> int:
    """Where the next life begins."""
    checkpoint = newest_readable_checkpoint(directory / "checkpoints")
    return 0 if checkpoint is None else torch.load(checkpoint, weights_only=True)["global_step"]


def live(directory: Path, fatal: Fatality) -> dict[str, Any]:
    """Train in a process of its own until it is killed, or has finished; tells what became of it."""
    begun_at = steps_saved(directory)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def tell(word: bytes) -> None:
            os.write(writing, word)

        code = 1
        try:
            os.chdir(directory)
            train(tell, fatal)
            if fatal.at_end:
                die()
            code = 0
        except BaseException:  # noqa: BLE001  # nothing may get back into the parent's frames
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    steps, in_write = 0, False
    with os.fdopen(reading, "rb", buffering=0) as words:
        while word := words.read(1):
            steps += word == STEP
            in_write = word == IN_WRITE
    _, status = os.waitpid(child, 0)
    return {
        "killed": os.WIFSIGNALED(status),
        "code": status,
        "begun_at": begun_at,
        "steps": steps,
        "in_write": in_write,
    }


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    uninterrupted, killed = (directory / run for run in RUNS)
    for run in (uninterrupted, killed):
        run.mkdir()
    live(uninterrupted, Fatality())
    lives = [live(killed, draw_fatality(number, steps_saved(killed))) for number in range(KILLS)]
    lives.append(live(killed, Fatality(at_end=True)))
    shutil.copy(killed / LAST, directory / "trained.ckpt")  # the last life begins at its end, and may write it anew
    lives.append(live(killed, Fatality()))
    (directory / "lives.json").write_text(json.dumps(lives))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
