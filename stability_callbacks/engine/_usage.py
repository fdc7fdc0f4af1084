"""What is used twice, and is said at train start."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.utilities import rank_zero_warn

from stability_callbacks.engine._hooks import Phase, StepHooks

__all__ = ["warn_of_doubles"]

# Several faults, monitors, schedules and penalties may be wanted; what judges, clips, records and recovers is one.
_ONCE = {
    Phase.JUDGE: ("guards", "a step is judged, counted and announced by each"),
    Phase.RECORD: ("recorders", "each incident is recorded by each"),
    Phase.RECOVER: ("rollbacks", "each keeps snapshots of its own and goes back by itself"),
}


def warn_of_doubles(callbacks: Iterable[StepHooks]) -> None:
    """Warn where two callbacks do the same work, as a suite and a callback of the user's own beside it.

    Args:
        callbacks: The callbacks of a trainer.
    """
    found: dict[str, list[str]] = {}
    for callback in callbacks:
        if callback.phase in _ONCE:
            found.setdefault(" ".join(_ONCE[callback.phase]), []).append(type(callback).__name__)
        elif _overrides(callback, "clip"):
            found.setdefault("clip", []).append(type(callback).__name__)
    for phase, (what, consequence) in _ONCE.items():
        names = found.get(" ".join(_ONCE[phase]), [])
        if len(names) > 1:
            _warn(names, what, consequence)
    if len(found.get("clip", [])) > 1:
        _warn(found["clip"], "clippings", "gradients are clipped by one after the other")


def _warn(names: list[str], what: str, consequence: str) -> None:
    rank_zero_warn(
        f"There are {len(names)} {what} among the trainer's callbacks ({', '.join(names)}): {consequence}. If one of "
        "them came with stability_suite(), replace it there: "
        "[each for each in stability_suite(kind) if not isinstance(each, ...)] + [yours]."
    )


def _overrides(callback: StepHooks, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(StepHooks, hook)
