"""What a callback may contribute to the life of a step, and when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from stability_callbacks.diagnosis import Incident
from stability_callbacks.engine._records import PendingRecord, StepRecord
from stability_callbacks.engine._step import OptimizerStep
from stability_callbacks.engine._training import Training

__all__ = ["Participants", "Phase", "StepHooks"]


class Phase(IntEnum):
    """When a callback's turn comes in each hook, whatever its place in the trainer's list.

    What acts stands before what follows from it: an incident is recorded before the state that it happened in is
    replaced.
    """

    FAULT = 0
    """Puts faults into training, before anyone looks."""
    OBSERVE = 1
    """Looks, and changes nothing."""
    JUDGE = 2
    """Votes on steps."""
    CLIP = 3
    """Changes gradients, or shrinks weights."""
    SCHEDULE = 4
    """Multiplies learning rates."""
    RECORD = 5
    """Writes down what happened."""
    RECOVER = 6
    """Replaces the state of training."""
    LOG = 7
    """Tells of what all others did."""


class StepHooks:
    """The hooks of a step, in the order in which they fire; each does nothing unless a subclass says otherwise.

    Attributes:
        phase: When its turn comes in each hook. Subclasses inherit it.
    """

    phase: ClassVar[Phase] = Phase.OBSERVE

    @property
    def state_key(self) -> str:
        """Tells it from the others of its phase, and finds its state in checkpoints."""
        return type(self).__qualname__

    # ---- train start

    def prepare(self, training: Training) -> None:
        """Check the configuration and read what is known at train start."""

    def protects_buffers(self) -> bool:
        """Whether the model's buffers must be backed up before each step, and restored if it is skipped."""
        return False

    def guards_checkpoints(self) -> bool:
        """Whether ``ModelCheckpoint`` must write no state that is not finite."""
        return False

    def votes_on_nonfinite(self) -> bool:
        """Whether it votes against steps whose loss is NaN, so that an exception of bad numbers may become one."""
        return False

    def begin_training(self, training: Training) -> None:
        """Start work that needs all callbacks prepared."""

    def on_optimizers_changed(self, training: Training) -> None:
        """Optimizers were replaced, or have other parameters than before: make room for what is new.

        Optimizers go by their position: what was kept of the one at a position goes on with the new one. Comes between
        steps, or while one is measured.
        """

    # ---- forward and backward

    def inject_before_forward(self, batch: Any, batch_idx: int) -> None:
        """Rehearse a fault: change a micro-batch or the state of training before anyone looks at them."""

    def on_micro_batch(self, batch: Any, batch_idx: int, first: bool) -> None:
        """Look at a micro-batch before its forward pass; ``first`` says that a new window begins with it."""

    def inject_before_backward(self, loss: Tensor) -> None:
        """Rehearse a fault: change a micro-batch's loss in place before anyone looks at it."""

    # ---- the gradients are there: measure and judge, change nothing

    def norm_types(self) -> Sequence[float]:
        """The norms that must be measured before anyone changes a gradient."""
        return ()

    def compares_losses(self) -> bool:
        """Whether it remembers losses, so that all processes must show it the same ones."""
        return False

    def observe(self, step: OptimizerStep) -> None:
        """Look at the raw gradients."""

    def vote(self, step: OptimizerStep) -> Sequence[tuple[str, Tensor]]:
        """Vote against the step: the kind of incident and a 0-dim boolean for each detector."""
        return ()

    def watch(self, step: OptimizerStep) -> Sequence[tuple[str, Tensor]]:
        """Flag the step without voting against it: a name and a 0-dim boolean, the same on all ranks in the record."""
        return ()

    # ---- inside of ``optimizer.step``

    def clip(self, step: OptimizerStep) -> None:
        """Shrink the gradients."""

    def rate_multipliers(self, step: OptimizerStep) -> Sequence[float] | None:
        """A factor for the learning rate of each parameter group, in the optimizer's next step."""
        return None

    def before_update(self, step: OptimizerStep) -> None:
        """Look at weights and clipped gradients right before the arithmetic."""

    def penalize(self, step: OptimizerStep) -> None:
        """Add penalties, with the learning rates of the step in force."""

    def after_update(self, step: OptimizerStep) -> None:
        """Look at the weights right after it."""

    # ---- the step is over

    def on_step_finished(self, step: OptimizerStep, record: PendingRecord) -> None:
        """Keep a finished step's numbers, which still lie on the device."""

    def on_step_attempted(self, step: OptimizerStep) -> None:
        """Count the step, whether it was applied or skipped."""

    def needs_records(self, training: Training) -> bool:
        """Whether all steps must be on record at the end of this batch, even if the host has to wait for it."""
        return False

    def on_step_record(self, record: StepRecord) -> None:
        """Read the record of a finished step; they come in order, up to one log interval late."""

    def on_incident(self, incident: Incident) -> None:
        """Read of an intervention."""

    def examine(self, training: Training) -> None:
        """Look for the causes of incidents, while the state of training is still the one that they happened in."""

    def announce(self, training: Training) -> None:
        """Tell the user of what happened, with its cause."""

    def after_batch(self, training: Training) -> None:
        """Act on the state of training, once a batch with a step is over and on record as far as the host knows."""

    def divergence(self) -> str | None:
        """Why training must stop, if it must."""
        return None

    # ---- metrics

    def logs_now(self, training: Training) -> bool:
        """Whether this step's scalars are wanted."""
        return training.is_logging_step()

    def device_scalars(self) -> Sequence[tuple[Sequence[str], Tensor]]:
        """Names and values (1-dim) of metrics that lie on the device."""
        return ()

    def device_payloads(self) -> Sequence[tuple[Tensor, Callable[[list[float], int], None]]]:
        """Numbers (1-dim) that lie on the device, and who takes them on the host, with their place on the x-axis."""
        return ()

    def host_scalars(self) -> Mapping[str, float]:
        """Metrics that the host knows, asked once the steps so far are on record."""
        return {}

    # ---- snapshots, and the end

    def statistics(self) -> Sequence[Stateful]:
        """What was learned from gradients and losses, and must go back when training goes back to a snapshot."""
        return ()

    def forget_failures(self) -> None:
        """Begin to count failures anew: the state that is about to be saved is the last good one, to go on from."""

    def finish_training(self, training: Training) -> None:
        """Training has ended, or an exception ended it: do what was put off."""


_HOOKS = tuple(name for name, member in vars(StepHooks).items() if callable(member) and not name.startswith("__"))


class Participants:
    """The callbacks that take part in each hook, in the order of their phases, and by their state keys in each phase.

    Args:
        callbacks: Callbacks with a ``state_key``, in any order.

    Example:
        >>> class Watches(StepHooks):
        ...     def observe(self, step):
        ...         pass
        >>> participants = Participants([Watches()])
        >>> len(participants["observe"]), len(participants["clip"])
        (1, 0)
    """

    def __init__(self, callbacks: Iterable[StepHooks]) -> None:
        self.all: tuple[StepHooks, ...] = tuple(
            sorted(callbacks, key=lambda callback: (callback.phase, callback.state_key))
        )
        self._of_hook = {name: tuple(each for each in self.all if _takes_part(each, name)) for name in _HOOKS}
        told = {id(each) for name in ("device_scalars", "device_payloads", "host_scalars") for each in self[name]}
        self.logging = tuple(each for each in self.all if id(each) in told)

    def __getitem__(self, hook: str) -> tuple[StepHooks, ...]:
        """The callbacks that take part in a hook, by its name."""
        return self._of_hook[hook]


def _takes_part(callback: StepHooks, hook: str) -> bool:
    return getattr(getattr(callback, hook), "__func__", None) is not getattr(StepHooks, hook)
