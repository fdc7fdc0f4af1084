"""Trains in a process of its own, kills it again and again, and lets it go on; started by test_kill.py.

A process takes seconds to import torch and Lightning, so one does that and forks those that train.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
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

RUNS = ("uninterrupted", "killed")

# What a process tells the one that forked it.
STEP, WRITE, KILL_ME = b"s", b"w", b"k"


class DropoutNet(TinyModel):
    """Batch normalization and dropout: buffers, and random numbers in each step."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


class RandomStateKeeper(Callback):
    """Saves the random state, as Lightning's checkpoints do not, and tells of each step."""

    def __init__(self, tell: Callable[[bytes], None]) -> None:
        self.tell = tell

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.tell(STEP)

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
        self.tell(WRITE)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        whole = content.getvalue()
        with Path(path).open("wb", buffering=0) as file:
            if self.writes == self.fatal.write:
                file.write(whole[: int(self.fatal.fraction * len(whole))])
                self.tell(KILL_ME)
                time.sleep(60)
            file.writelines(whole[start : start + 8192] for start in range(0, len(whole), 8192))


class Fatality(NamedTuple):
    """When a process is killed: in its n-th write of a checkpoint, or some time after the start of its n-th step."""

    write: int = 0
    fraction: float = 0.0
    step: int = 0
    delay: float = 0.0


def draw_fatality(number: int) -> Fatality:
    """Every other kill hits a write; each life is long enough to get to the next checkpoint most times."""
    stream = random.Random(number)
    if number % 2:
        return Fatality(write=stream.randrange(1, 16), fraction=stream.random())
    return Fatality(step=stream.randrange(2, 18), delay=stream.uniform(0, 0.02))


def train(tell: Callable[[bytes], None], fatal: Fatality) -> None:
    """Train from the newest checkpoint that can be read, or from the start, to the end."""
    torch.manual_seed(0)
    checkpoint = newest_readable_checkpoint("checkpoints")
    callbacks = [
        ModelCheckpoint("checkpoints", every_n_train_steps=CHECKPOINT_EVERY, save_last=True),
        RandomStateKeeper(tell),
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


def live(directory: Path, fatal: Fatality) -> dict[str, Any]:
    """Train in a process of its own until it is killed, or has finished; tells what became of it."""
    checkpoint = newest_readable_checkpoint(directory / "checkpoints")
    begun_at = 0 if checkpoint is None else torch.load(checkpoint, weights_only=True)["global_step"]
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
            code = 0
        except BaseException:  # noqa: BLE001  # nothing may get back into the parent's frames
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    steps, in_write = 0, False
    with os.fdopen(reading, "rb", buffering=0) as words:
        while word := words.read(1):
            steps += word == STEP
            in_write = word == KILL_ME
            if in_write or (word == STEP and steps == fatal.step):
                time.sleep(fatal.delay)
                os.kill(child, signal.SIGKILL)
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
    lives = [live(killed, fatal) for fatal in (*map(draw_fatality, range(KILLS)), Fatality())]
    (directory / "lives.json").write_text(json.dumps(lives))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
