"""A schedule with another peak than 1."""

from __future__ import annotations

from stability_callbacks._validation import check_instance, check_number
from stability_callbacks.schedules._schedule import Schedule


class Scaled(Schedule):
    r"""Another schedule times a constant.

    Use it where a schedule's values are not multiples of something: a clip threshold, say. Or to give one group
    of parameters a smaller learning rate than the others. With a factor :math:`c` and the other schedule :math:`m`:

    .. math:: m'(t) = c \, m(t)

    Args:
        schedule: The other schedule.
        factor: The new peak, > 0.

    Raises:
        TypeError: If ``schedule`` is not a schedule or ``factor`` not a number.
        ValueError: If ``factor`` is not positive.

    Example:
        >>> from stability_callbacks.schedules import WarmupLinear
        >>> schedule = Scaled(WarmupLinear(warmup=2, end=0.5), factor=4.0)
        >>> [schedule(step, total_steps=6) for step in range(7)]
        [0.0, 2.0, 4.0, 3.5, 3.0, 2.5, 2.0]
    """

    def __init__(self, schedule: Schedule, factor: float) -> None:
        self.schedule = check_instance("schedule", schedule, Schedule, "a schedule, such as WarmupCosine()")  # type: ignore[type-abstract]
        self.factor = check_number("factor", factor, above=0)
        self.total_steps = schedule.total_steps

    def __repr__(self) -> str:
        return f"Scaled(schedule={self.schedule!r}, factor={self.factor!r})"

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Return the other schedule's value at ``step`` times the factor; see :meth:`Schedule.__call__`."""
        return self.factor * self.schedule(step, total_steps)

    @property
    def needs_total(self) -> bool:
        """Whether a call without ``total_steps`` is an error."""
        return self.schedule.needs_total

    @property
    def warmup(self) -> int | float | None:
        """The length of the other schedule's warm-up as it was given; None if it has none."""
        return getattr(self.schedule, "warmup", None)

    def warmup_steps(self, total_steps: int | None = None) -> int:
        """Return the number of steps before the peak is reached."""
        return self.schedule.warmup_steps(total_steps)
