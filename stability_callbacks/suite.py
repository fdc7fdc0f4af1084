"""The right callbacks for a task, in one call."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from stability_callbacks._validation import check_bool, check_choice
from stability_callbacks.callbacks import (
    FlightRecorder,
    GradientClipping,
    GradientMonitor,
    Initialization,
    LRSchedule,
    Rollback,
    StepGuard,
)
from stability_callbacks.clipping import AGC, ClipRule, NormClip
from stability_callbacks.initialization import Auto
from stability_callbacks.schedules import WarmupCosine

__all__ = ["stability_suite"]

# Share of training spent warming up. Attention and recurrence need longer than plain feed-forward nets.
_WARMUP = {"mlp": 0.05, "cnn": 0.05, "rnn": 0.06, "transformer": 0.1}


def stability_suite(kind: str, *, initialize: bool = False, schedule: bool = False) -> list[Callback]:
    """The callbacks recommended for a kind of model, in their recommended settings.

    Protective by default: gradients are watched (:class:`GradientMonitor`), clipped to norm 1
    (:class:`GradientClipping`), non-finite steps are skipped (:class:`StepGuard`), training goes back to the last good
    state when that is not enough (:class:`Rollback`), and all of it is recorded (:class:`FlightRecorder`). Weights and
    learning rate are touched only when asked, since the weights may be pretrained and a scheduler may be there; except
    by a rollback, which the weights have to be ruined for.

    In a ``"cnn"`` each unit's gradient is first clipped to 1 % of its weight's norm
    (:class:`~stability_callbacks.clipping.AGC`), except in the classifier: that is taken to be the layer defined last.
    Where it is not (an auxiliary head or a loss with weights of its own comes after it), pass
    ``GradientClipping([AGC(exclude=["^classifier"]), NormClip()])`` in the place of the suite's. One percent a step
    holds back SGD with learning rates well below 0.1: raise the rate, or ``AGC(clip=0.1)``.

    Args:
        kind: ``"mlp"``, ``"cnn"``, ``"rnn"`` or ``"transformer"``.
        initialize: Whether to also initialize the weights by layer type and activation (:class:`Initialization` with
            :class:`~stability_callbacks.initialization.Auto`). Never for pretrained weights. Default False.
        schedule: Whether to also warm the learning rate up and decay it by a cosine (:class:`LRSchedule`); the share
            of warm-up is 5 % for MLPs and CNNs, 6 % for recurrent networks, 10 % for Transformers. Default False.

    Returns:
        A new list of callbacks for ``Trainer(callbacks=...)``.

    Raises:
        TypeError: If ``initialize`` or ``schedule`` is not a boolean.
        ValueError: If ``kind`` is unknown.

    Example:
        >>> from stability_callbacks import stability_suite
        >>> [type(callback).__name__ for callback in stability_suite("rnn")]
        ['GradientMonitor', 'GradientClipping', 'StepGuard', 'Rollback', 'FlightRecorder']
    """
    kind = check_choice("kind", kind, tuple(_WARMUP))
    callbacks: list[Callback] = [
        GradientMonitor(),
        GradientClipping(_clip_rules(kind)),
        StepGuard(),
        Rollback(),
        FlightRecorder(),
    ]
    if check_bool("schedule", schedule):
        callbacks.insert(0, LRSchedule(WarmupCosine(warmup=_WARMUP[kind])))
    if check_bool("initialize", initialize):
        callbacks.insert(0, Initialization(Auto()))
    return callbacks


def _clip_rules(kind: str) -> list[ClipRule]:
    # The total norm is bounded in a CNN too, since AGC leaves the classifier out.
    unit_wise: list[ClipRule] = [AGC(exclude_last_layer=True)] if kind == "cnn" else []
    return [*unit_wise, NormClip(max_norm=1.0)]
