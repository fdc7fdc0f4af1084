"""One of the processes that test_fault_injector_distributed.py lets train together, with faults on one or all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stability_callbacks import FaultInjector, StepGuard
from stability_callbacks.faults import Fault
from tests import distributed_worker as worker

FAULTY_STEP = 2
# A batch that is put in at the faulty step, the same with and without the fault.
EXTRA_BATCH = {FAULTY_STEP: (0, "")}
TARGETS = ("activation", "gradient", "input", "loss")
RANKS = (None, 1)


def rehearse(kind: str, faults: list[Fault], *, guard: bool, extra_batch: bool = True, **arguments: Any) -> Any:
    injector = FaultInjector(faults)
    batches = worker.batches(EXTRA_BATCH if extra_batch else None)
    result = worker.train(kind, batches, [injector, *([StepGuard()] if guard else [])], **arguments)
    return {"state": result["state"], "skipped": result["skipped"], "injected": injector.injected}


def alone(kind: str, directory: Path) -> Any:
    """Without a guard, in the last step: what is hit, and whose it is."""
    last = worker.GOOD_BATCHES - 1
    faults = {
        "none": Fault("weight", steps=1000),
        "gradient on 1": Fault("gradient", steps=last, rank=1),
        "gradient on all": Fault("gradient", steps=last),
        "rate on 1": Fault("learning_rate", 2.0, steps=last, rank=1),
        "input on 1": Fault("input", steps=last, rank=1),
        "accumulated gradient on 1": Fault("gradient", steps=last // 2, rank=1),
    }
    return {
        name: rehearse(
            kind, [fault], guard=False, extra_batch=False, accumulate_grad_batches=2 if "accumulated" in name else 1
        )
        for name, fault in faults.items()
    }


def guarded(kind: str, directory: Path) -> Any:
    """With a guard: a skipped fault, on any rank."""
    clean = rehearse(kind, [Fault("weight", steps=1000)], guard=True, extra_batch=False)
    faulty = {
        (target, rank): rehearse(kind, [Fault(target, steps=FAULTY_STEP, rank=rank)], guard=True)
        for target in TARGETS
        for rank in RANKS
    }
    return {"clean": clean, **faulty}


if __name__ == "__main__":
    worker.SCENARIOS[:] = [(alone, ("ddp",)), (guarded, ("ddp", "fsdp2"))]
    worker.main(int(sys.argv[1]), Path(sys.argv[2]))
