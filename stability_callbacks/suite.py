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
from stability_callbacks.clipping import OutlierClip
from stability_callbacks.initialization import Auto
from stability_callbacks.schedules import WarmupCosine

__all__ = ["stability_suite"]

# Share of training spent warming up. Attention and recurrence need longer than plain feed-forward nets.
_WARMUP = {"mlp": 0.05, "cnn": 0.05, "rnn": 0.06, "transformer": 0.1}


def stability_suite(kind: str, *, initialize: bool = False, schedule: bool = False) -> list[Callback]:
    """The callbacks recommended for a kind of model, in their recommended settings.

    Protective by default: gradients are watched (:class:`GradientMonitor`), clipped where their norm stands out
    (:class:`GradientClipping`), non-finite steps are skipped (:class:`StepGuard`), training goes back to the last good
    state when that is not enough (:class:`Rollback`), and all of it is recorded (:class:`FlightRecorder`). Weights and
    learning rate are touched only when asked, since the weights may be pretrained and a scheduler may be there; except
    by a rollback, which the weights have to be ruined for.

    In an ``"mlp"`` and a ``"cnn"`` a norm is clipped only if it is an outlier among those of the last steps
    (:class:`~stability_callbacks.clipping.OutlierClip`): a run that is sound goes on as without it, with SGD too. In an
    ``"rnn"`` and a ``"transformer"`` the norm is clipped to 1, as is customary there, or to what is ordinary in the
    run's first 16 steps where that is more, as it is for a loss in large units. ``docs/no_harm.md`` has the evidence.

    None of these holds back a learning rate at which ordinary steps are too large. Where only that trains a network
    (many layers without normalization, say), add a rule that acts on every step, in the place of the suite's:
    ``GradientClipping(NormClip(1.0))``, or ``GradientClipping([AGC(exclude_last_layer=True), NormClip(1.0)])``.

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
        GradientClipping(_clip_rule(kind)),
        StepGuard(),
        Rollback(),
        FlightRecorder(),
    ]
    if check_bool("schedule", schedule):
        callbacks.insert(0, LRSchedule(WarmupCosine(warmup=_WARMUP[kind])))
    if check_bool("initialize", initialize):
        callbacks.insert(0, Initialization(Auto()))
    return callbacks


def _clip_rule(kind: str) -> OutlierClip:
    if kind in ("mlp", "cnn"):
        return OutlierClip()
    # Recurrence and attention are customarily clipped to norm 1, and some networks need it: see docs/no_harm.md.
    return OutlierClip(z_threshold=2.0 if kind == "rnn" else 1.0, min_threshold=1.0, learn_steps=16)
