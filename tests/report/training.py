"""A run as training would have left it, made up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from stability_callbacks.diagnosis import Cause, Incident, IncidentLog, RandomState, StepRow, write_bundle

LAYERS = [
    "embedding",
    *(
        f"blocks.{block}.{part}"
        for block in range(6)
        for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ),
    "norm",
    "head",
]
STEPS = 6000
BAD_STEP, SPIKE_STEP, INPUT_STEP, ROLLBACK_STEP = 2113, 3307, 4410, 5203

CAUSE = Cause(
    True,
    "forward",
    "blocks.3.mlp",
    "GatedMLP",
    "log",
    "model.py:42 in forward: `gate = x.log()`",
    "log made 3 -inf in 512 values (log of 3 values <= 0) in module 'blocks.3.mlp' (GatedMLP), at model.py:42",
)


def curves(steps: int = STEPS, seed: int = 0) -> dict[str, np.ndarray]:
    """Loss, norms and rate of every step, with a NaN and a spike."""
    random = np.random.default_rng(seed)
    t = np.arange(steps)
    rate = 3e-4 * np.minimum(t / (0.05 * steps), 0.5 * (1 + np.cos(np.pi * t / steps)))
    loss = 2.0 + 4.5 * np.exp(-t / (0.12 * steps)) + random.normal(0, 0.06, steps)
    norm = np.exp(random.normal(0, 0.35, steps)) * (0.6 + 3 * np.exp(-t / (0.03 * steps)))
    loss[ROLLBACK_STEP - 60 : ROLLBACK_STEP] += np.linspace(0, 4, 60)
    norm[ROLLBACK_STEP - 60 : ROLLBACK_STEP] *= np.exp(np.linspace(0, 5, 60))
    loss[SPIKE_STEP], norm[SPIKE_STEP] = 9.7, 431.0
    loss[BAD_STEP] = norm[BAD_STEP] = math.nan
    return {
        "train_loss": loss,
        "grad_norm/total": norm,
        "grad_norm_clipped/total": np.minimum(norm, 1),
        "lr/AdamW": rate,
    }


def layer_norms(norm: np.ndarray, seed: int = 1) -> dict[str, np.ndarray]:
    """Each layer's share of the total norm."""
    random = np.random.default_rng(seed)
    return {
        name: norm * np.exp(random.normal(-2 + 1.5 * math.sin(place), 0.3, len(norm)))
        for place, name in enumerate(LAYERS)
    }


def write_events(directory: Path, every: int = 10, steps: int = STEPS) -> None:
    """What TensorBoardLogger leaves."""
    values = curves(steps)
    values |= {f"grad_norm/{name}": norms for name, norms in layer_norms(values["grad_norm/total"]).items()}
    with SummaryWriter(str(directory)) as writer:
        for step in range(0, steps, every):
            for name, each in values.items():
                # As loggers do that log the extreme of the steps since the last time.
                window = (
                    each[max(step - every + 1, 0) : step + 1] if name.startswith(("train", "grad")) else each[[step]]
                )
                writer.add_scalar(name, window.max(), step, walltime=1.8e9 + 0.25 * step)


def incident(step: int, kind: str, **details: object) -> Incident:
    values = {"evidence": {}, "action": "skipped", "optimizer": "AdamW", "time": "2027-01-15T08:00:00+00:00"} | details
    return Incident(step, step // 1000, step % 1000, 0, kind, **values)  # type: ignore[arg-type]


def incidents() -> list[Incident]:
    """One run's incidents of every kind."""
    overflow = [
        incident(step, "loss_scale", evidence={"loss": 6.4, "grad_norm": math.inf, "loss_scale": 65536.0 / 2**place})
        for place, step in enumerate((0, 1, 2))
    ]
    bad = {"loss": math.nan, "grad_norm": math.nan, "votes": "nonfinite", "cause": CAUSE.explanation}
    place = {"module": CAUSE.module, "operation": CAUSE.operation, "source": CAUSE.source}
    return [
        *overflow,
        incident(BAD_STEP, "nonfinite", evidence=bad, bundle=f"bundles/step={BAD_STEP}-nonfinite", **place),
        incident(BAD_STEP + 411, "nonfinite", evidence=bad, bundle="bundles/step=1-gone", **place),
        incident(
            SPIKE_STEP, "spike", evidence={"loss": 9.7, "grad_norm": 431.0}, bundle=f"bundles/step={SPIKE_STEP}-spike"
        ),
        incident(INPUT_STEP, "input", evidence={"loss": 2.1, "grad_norm": 0.71, "input_magnitude": 31250.0}),
        *(
            incident(step, "spike", evidence={"loss": 5.9, "grad_norm": 88.0 + step % 7})
            for step in range(ROLLBACK_STEP - 5, ROLLBACK_STEP)
        ),
        incident(
            ROLLBACK_STEP,
            "rollback",
            evidence={"reason": "5 steps in a row were skipped", "restored_step": 5100, "lr_scale": 0.5},
            action="restored the state of step 5100, learning rate times 0.5",
            optimizer=None,
        ),
        incident(
            ROLLBACK_STEP - 1,
            "checkpoint_refused",
            evidence={"nonfinite": "blocks.3.mlp.up.weight"},
            action="no checkpoint was written",
            optimizer=None,
        ),
    ]


def history(step: int, kind: str, length: int = 128) -> list[StepRow]:
    """The steps up to an incident."""
    values = curves()
    layers = layer_norms(values["grad_norm/total"])
    names = list(values)
    rows = []
    for at in range(step - length + 1, step + 1):
        loss, norm, clipped, rate = (float(values[name][at]) for name in names)
        norms = {name: float(each[at]) for name, each in layers.items()}
        rows.append(
            StepRow(
                at,
                at // 1000,
                at % 1000,
                (rate,),
                loss,
                norm,
                clipped,
                min(1.0, 1 / norm),
                (kind,) * (at == step),
                None,
                norms,
            )
        )
    return rows


def write_record(directory: Path, events: Sequence[Incident] | None = None) -> None:
    """What FlightRecorder leaves."""
    log = IncidentLog(directory / "incidents.jsonl")
    for each in incidents() if events is None else events:
        log.append(each)
    meta: Mapping[str, object] = {"model": "package.model:Transformer", "precision": "32-true"}
    for step, kind in ((BAD_STEP, "nonfinite"), (SPIKE_STEP, "spike")):
        write_bundle(
            directory / "bundles",
            incident=incident(step, kind),
            history=history(step, kind),
            batches=[torch.ones(2)],
            weights={"weight": torch.ones(2)},
            rng=RandomState.capture(),
            cause=CAUSE if kind == "nonfinite" else None,
            meta=meta,
        )


def write_run(directory: Path, every: int = 10) -> None:
    """A whole run."""
    write_events(directory, every)
    write_record(directory / "flight_record")
