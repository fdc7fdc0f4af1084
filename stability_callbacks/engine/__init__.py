"""What drives the callbacks: Lightning's hooks, the life of a step, records, metrics, checkpoints, processes."""

from stability_callbacks.engine._callback import StabilityCallback
from stability_callbacks.engine._callback_state import STATE_VERSION, load_in_place
from stability_callbacks.engine._checkpoint_ring import CheckpointError, CheckpointRing, write_checkpoint
from stability_callbacks.engine._hooks import Participants, Phase, StepHooks
from stability_callbacks.engine._learning_rates import LearningRates
from stability_callbacks.engine._lifecycle import StepLifecycle
from stability_callbacks.engine._nonfinite import Nonfinite, find_nonfinite
from stability_callbacks.engine._processes import Processes
from stability_callbacks.engine._records import PendingRecord, StepRecord
from stability_callbacks.engine._step import OptimizerStep, optimizer_labels
from stability_callbacks.engine._step_clock import StepClock
from stability_callbacks.engine._step_life import StepLife
from stability_callbacks.engine._training import Training
from stability_callbacks.engine._training_state import averaged_models, averaging_callbacks, loss_scaler
from stability_callbacks.engine._training_step import detached_from_trainer, loss_of
from stability_callbacks.engine._verdict import Verdict
from stability_callbacks.engine._window import AccumulationWindow

__all__ = [
    "STATE_VERSION",
    "AccumulationWindow",
    "CheckpointError",
    "CheckpointRing",
    "LearningRates",
    "Nonfinite",
    "OptimizerStep",
    "Participants",
    "PendingRecord",
    "Phase",
    "Processes",
    "StabilityCallback",
    "StepClock",
    "StepHooks",
    "StepLife",
    "StepLifecycle",
    "StepRecord",
    "Training",
    "Verdict",
    "averaged_models",
    "averaging_callbacks",
    "detached_from_trainer",
    "find_nonfinite",
    "load_in_place",
    "loss_of",
    "loss_scaler",
    "optimizer_labels",
    "write_checkpoint",
]
