"""The callback that skips bad steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stability_callbacks._validation import check_bool, check_instance, check_integer, check_number
from stability_callbacks.detection import Detector, NonFinite, StepEvidence, input_magnitude
from stability_callbacks.engine import (
    OptimizerStep,
    Phase,
    StabilityCallback,
    StepRecord,
    Training,
    load_in_place,
)

__all__ = ["StepGuard"]

_log = logging.getLogger(__name__)

# Skips are announced one by one up to this number, then only when it has grown tenfold.
_ANNOUNCED_SKIPS = 10

_WHAT_TO_DO = (
    "The weights are those after the last good step. Look for bad input data, lower the learning rate, clip gradients "
    "harder, or raise the limit."
)


class StepGuard(StabilityCallback):
    """Skips optimizer steps that detectors find bad, as if their batch had never been, and stops hopeless runs.

    A skipped step changes nothing: not the weights, nor any optimizer state, weight decay or step count, nor a buffer
    such as batch normalization's statistics and counters, nor a teacher that ``training_step`` moves, nor running
    metrics (``self.log``, torchmetrics), nor the statistics of clip rules. Only the clock goes on:
    ``trainer.global_step`` and schedules, so that these end where they should. Under gradient accumulation the whole
    window of micro-batches is dropped. All ranks skip together.

    An exception that bad numbers caused (``torch.distributions`` of NaN, a failed Cholesky factorization, a bare
    ``Exception`` beside a loss of NaN) makes a bad step, too; others end training as usual. In the backward pass this
    holds with one process only, and under FSDP2 not at all.

    While it is active, ``ModelCheckpoint`` writes no state that is not finite: it keeps the checkpoints that it has.

    Training stops with :class:`~stability_callbacks.TrainingDivergedError` after too many skips in a row, or too large
    a share of the recent steps. With torch's fused optimizers the host does not wait for verdicts: the steps are
    skipped on the device, and counts and that error come up to one log interval later.

    Args:
        detectors: What makes a step bad, a non-empty sequence. Default: ``[NonFinite()]``. Each optimizer has its own
            copies of detectors that remember something, such as :class:`~stability_callbacks.detection.Spike`.
        max_consecutive_skips: Training stops after this many skips in a row, >= 1. Default 50.
        max_skipped_share: Training stops when more than this share of the last ``share_window`` steps was skipped, in
            ``(0, 1]``. Default 0.5.
        protect_buffers: Whether a skip restores the model's buffers. They are backed up before each step, which costs a
            copy of them. Default True.
        share_window: Number of steps for the share, >= 1; it is judged once that many were seen. Default 200.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range, or there is no detector.
        TrainingDivergedError: During training, see above.

    Example:
        >>> from stability_callbacks import StepGuard
        >>> from stability_callbacks.detection import NonFinite
        >>> guard = StepGuard([NonFinite()], max_consecutive_skips=20)
        >>> guard.skipped_steps
        0

    Metrics:
        ``stability/skipped_steps``: number of steps skipped so far; ``stability/loss_scale``: the loss scale, in fp16.
    """

    phase = Phase.JUDGE

    _skipped_steps: int
    _consecutive_skips: int
    _recent: deque[bool]
    _diverged: tuple[str, StepRecord] | None
    _unannounced: list[tuple[StepRecord, str, int]]
    _detectors_of_optimizer: list[list[Detector]]
    _input_magnitude: Tensor | None
    _warned_of_inputs: bool
    _evidence: StepEvidence | None
    _suspects: _Suspects | None
    _found: dict[str, _Suspects]
    _loss_scale: Tensor | None

    def __init__(
        self,
        detectors: Sequence[Detector] | None = None,
        max_consecutive_skips: int = 50,
        max_skipped_share: float = 0.5,
        protect_buffers: bool = True,
        share_window: int = 200,
    ) -> None:
        super().__init__()
        self.detectors = _check_detectors([NonFinite()] if detectors is None else detectors)
        self.max_consecutive_skips = check_integer("max_consecutive_skips", max_consecutive_skips, at_least=1)
        self.max_skipped_share = check_number("max_skipped_share", max_skipped_share, above=0, at_most=1)
        self.protect_buffers = check_bool("protect_buffers", protect_buffers)
        self.share_window = check_integer("share_window", share_window, at_least=1)
        # Lightning asks for the key at every call of every hook.
        self._state_key = self._generate_state_key(detectors=self.detectors)
        self._reset()

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped so far."""
        self._catch_up(everywhere=False)
        return self._skipped_steps

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        return {
            "skipped_steps": self._skipped_steps,
            "consecutive_skips": self._consecutive_skips,
            "recent": list(self._recent),
            "detectors": [[detector.state_dict() for detector in own] for own in self._detectors_of_optimizer],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped_steps = state_dict.get("skipped_steps", 0)
        self._consecutive_skips = state_dict.get("consecutive_skips", 0)
        self._recent = deque(state_dict.get("recent", ()), maxlen=self.share_window)
        load_in_place(self._detectors_of_optimizer, state_dict.get("detectors", ()), lambda: deepcopy(self.detectors))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._diverged = None
        if trainer.global_step == 0:
            self._reset()

    def prepare(self, training: Training) -> None:
        missing = len(training.steps) - len(self._detectors_of_optimizer)
        self._detectors_of_optimizer += [deepcopy(self.detectors) for _ in range(missing)]

    def on_optimizers_changed(self, training: Training) -> None:
        self.prepare(training)

    def protects_buffers(self) -> bool:
        return self.protect_buffers

    def votes_on_nonfinite(self) -> bool:
        return any(detector.kind == NonFinite.kind for detector in self.detectors)

    def guards_checkpoints(self) -> bool:
        return True

    def statistics(self) -> list[Detector]:
        return list(chain.from_iterable(self._detectors_of_optimizer))

    def compares_losses(self) -> bool:
        return any(detector.compares_losses for detector in self.detectors)

    def on_micro_batch(self, batch: Any, batch_idx: int, first: bool) -> None:
        if not any(detector.needs_inputs for detector in self.detectors):
            return
        before, now = None if first else self._input_magnitude, input_magnitude(batch)
        if now is None and not self._warned_of_inputs:
            self._warned_of_inputs = True
            rank_zero_warn(
                f"No floating-point tensor was found in a batch of type {type(batch).__name__}, so its range can't be "
                "checked. Batches may be tensors in tuples, lists, dicts, named tuples and dataclasses."
            )
        self._input_magnitude = now if before is None or now is None else torch.maximum(before, now)

    def observe(self, step: OptimizerStep) -> None:
        if self.logs_now(self.training):
            self._loss_scale = step.loss_scale

    def vote(self, step: OptimizerStep) -> list[tuple[str, Tensor]]:
        assert step.gradients is not None
        norms = step.gradients.norms()
        buffers = self.training.buffers
        buffer_names, nonfinite = buffers.nonfinite() if buffers is not None else ((), None)
        evidence = StepEvidence(step.loss, norms, nonfinite, self._input_magnitude)
        votes = [(each.kind, _vote_of(each, evidence)) for each in self._detectors_of_optimizer[step.index]]
        flags = [
            ~torch.isfinite(norms.per_tensor),
            *([] if nonfinite is None else [nonfinite.to(norms.total.device)]),
        ]
        names = (*norms.names, *buffer_names)
        self._suspects = _Suspects(names, len(norms.names), torch.cat(flags), self._input_magnitude)
        self._evidence = evidence
        return votes

    def on_step_attempted(self, step: OptimizerStep) -> None:
        if step.skip is None or self._suspects is None or self._evidence is None:
            return
        accepted = ~step.skip
        for detector in self._detectors_of_optimizer[step.index]:
            detector.update(self._evidence, accepted)
        if step.skipped:
            self._found[step.label] = self._suspects
        elif step.skipped is None:
            known = self._found.get(step.label)
            if known is None or known.names != self._suspects.names:
                known = self._suspects._replace(flags=torch.zeros_like(self._suspects.flags))
            flags = torch.where(step.skip, self._suspects.flags, known.flags)
            self._found[step.label] = known._replace(flags=flags, of_last_skip_only=True)
        self._suspects = self._evidence = None

    def on_step_record(self, record: StepRecord) -> None:
        self._recent.append(record.skipped)
        if not record.skipped:
            self._consecutive_skips = 0
            return
        self._skipped_steps += 1
        self._consecutive_skips += 1
        if self._skipped_steps <= _ANNOUNCED_SKIPS or str(self._skipped_steps).strip("0") == "1":
            self._unannounced.append((record, self._describe(record), self._skipped_steps))
        if self._diverged is None and (reason := self._judge(record)):
            self._diverged = reason, record
        if self._lifecycle is not None:
            found = self._found.get(record.optimizer)
            evidence = {} if found is None else found.evidence()
            self.training.report(self.training.step_incident(record, "skipped", evidence))

    def announce(self, training: Training) -> None:
        announcements, self._unannounced = self._unannounced, []
        if training.processes.is_first:
            for record, what, number in announcements:
                _log.warning("Skipped %s%s. %d skipped so far.", what, _cause_of(record, training), number)
                if number == _ANNOUNCED_SKIPS:
                    _log.warning("Further skips are only counted, in stability/skipped_steps and in the record.")

    def finish_training(self, training: Training) -> None:
        self.announce(training)

    def divergence(self) -> str | None:
        if self._diverged is None:
            return None
        reason, record = self._diverged
        return f"{reason}{_cause_of(record, self.training)}. {_WHAT_TO_DO}"

    def forget_failures(self) -> None:
        self._consecutive_skips = 0
        self._recent.clear()

    def device_scalars(self) -> list[tuple[Sequence[str], Tensor]]:
        scale, self._loss_scale = self._loss_scale, None
        return [] if scale is None else [(["stability/loss_scale"], scale.reshape(1))]

    def host_scalars(self) -> Mapping[str, float]:
        return {"stability/skipped_steps": float(self._skipped_steps)}

    def _judge(self, record: StepRecord) -> str | None:
        share = sum(self._recent) / len(self._recent)
        if self._consecutive_skips >= self.max_consecutive_skips:
            what = f"{self._consecutive_skips} steps in a row were skipped (max_consecutive_skips)"
        elif len(self._recent) == self.share_window and share > self.max_skipped_share:
            what = (
                f"{share:.0%} of the last {self.share_window} steps were skipped, more than "
                f"max_skipped_share={self.max_skipped_share:g}"
            )
        else:
            return None
        return f"Training has diverged: {what}. The last one was {self._describe(record)}"

    def _describe(self, record: StepRecord) -> str:
        where = f"step {record.global_step} (epoch {record.epoch}, batch {record.batch_idx}, {record.optimizer})"
        error = None if self._lifecycle is None else self.training.errors.get(record.global_step)
        if error is not None:
            return f"{where}: {error.text}{'' if error.source is None else f', raised at {error.source}'}"
        seen = f"{' and '.join(record.votes)}: loss {record.loss:g}, gradient norm {record.norm:g}"
        elsewhere = "" if record.found_here else "; found by another process"
        found = self._found.get(record.optimizer)
        return f"{where}, {seen}{elsewhere}{'' if found is None else found.describe()}"

    def _reset(self) -> None:
        self._skipped_steps = 0
        self._consecutive_skips = 0
        self._recent = deque(maxlen=self.share_window)
        self._detectors_of_optimizer = []
        self._found = {}
        self._warned_of_inputs = False
        self._unannounced = []
        self._diverged = self._suspects = self._evidence = self._input_magnitude = self._loss_scale = None


class _Suspects(NamedTuple):
    """Which gradients and buffers hold non-finite values, still on the device.

    Attributes:
        names: Names of parameters, then of buffers.
        parameters: How many of the names are parameters.
        flags: Boolean, one for each name.
        input_magnitude: The largest absolute input, where a detector asked for it.
        of_last_skip_only: Whether they may belong to a later skip, because the host learned of several at once.
    """

    names: tuple[str, ...]
    parameters: int
    flags: Tensor
    input_magnitude: Tensor | None = None
    of_last_skip_only: bool = False

    def read(self) -> tuple[list[str], list[str]]:
        """The names of bad gradients and of bad buffers."""
        names = [name if flag else None for name, flag in zip(self.names, self.flags.tolist(), strict=True)]
        gradients, buffers = names[: self.parameters], names[self.parameters :]
        return [name for name in gradients if name], [name for name in buffers if name]

    def evidence(self) -> dict[str, float | str]:
        """The same for the record."""
        if self.of_last_skip_only:
            return {}
        gradients, buffers = self.read()
        evidence: dict[str, float | str] = {}
        if gradients:
            evidence["nonfinite_gradients"] = f"{len(gradients)} of {self.parameters}, first {gradients[0]}"
        if buffers:
            evidence["nonfinite_buffers"] = ", ".join(buffers)
        if self.input_magnitude is not None:
            evidence["input_magnitude"] = float(self.input_magnitude)
        return evidence

    def describe(self) -> str:
        gradients, buffers = self.read()
        text = ""
        if gradients:
            text += f"; non-finite gradients in {len(gradients)} of {self.parameters} parameters, first {gradients[0]}"
        if buffers:
            text += f"; non-finite buffers {', '.join(buffers[:3])}{' ...' if len(buffers) > 3 else ''}"
        return text


def _cause_of(record: StepRecord, training: Training) -> str:
    cause = training.causes.get((record.optimizer, record.global_step))
    return "" if cause is None else f"; cause: {cause}"


def _vote_of(detector: Detector, evidence: StepEvidence) -> Tensor:
    # Where there is no gradient there is nothing to skip but what a bad forward pass wrote.
    if evidence.gradients.names or detector.kind == NonFinite.kind:
        return detector(evidence)
    return torch.zeros((), dtype=torch.bool)


def _check_detectors(detectors: Sequence[Detector]) -> list[Detector]:
    allowed = "a non-empty sequence of detectors, such as [NonFinite()]"
    if isinstance(detectors, Detector) or not isinstance(detectors, Sequence):
        raise TypeError(f"`detectors` must be {allowed}, got {detectors!r} of type {type(detectors).__name__}")
    if not detectors:
        raise ValueError(f"`detectors` must be {allowed}, got {detectors!r}")
    return [check_instance(f"detectors[{i}]", detector, Detector, "a detector") for i, detector in enumerate(detectors)]  # type: ignore[type-abstract]
