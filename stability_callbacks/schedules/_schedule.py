"""What every schedule is: a multiplier for each step, and a picture of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from stability_callbacks._validation import check_integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Enough for a smooth curve at any width of a figure.
_PLOTTED_STEPS = 2000


class Schedule(ABC):
    """A multiplier as a pure function of the step: 1 is the peak.

    Derive from it and write :meth:`__call__` to make a schedule of your own. Everything else has a default that suits a
    schedule without a warm-up and without an end. What a schedule owes:

    - It is a pure function: the same number for the same step and total, in whatever order they are asked for. It
      remembers nothing, so it needs no ``state_dict``, resumes at any step, and may serve several optimizers.
    - It gives a finite ``float`` >= 0 for every step from 0 on, also beyond the total.
    - Its highest value stands at step :meth:`warmup_steps`; up to there it never falls, and from there it falls or
      stays, restarts apart.
    - It raises a ``ValueError`` in a call without a total, None or infinite, where it :attr:`needs_total`, and works
      where it does not. A total given at construction is kept in :attr:`total_steps` and overrides the call's.
    - Pickles and copies give the same numbers, and its ``repr`` shows its settings: that of this class shows the
      attributes whose names begin without an underscore.

    Example:
        A schedule of your own, that falls in steps:

        >>> from stability_callbacks.schedules import Schedule
        >>> class Staircase(Schedule):
        ...     def __init__(self, every=1000, factor=0.5):
        ...         self.every = every
        ...         self.factor = factor
        ...
        ...     def __call__(self, step, total_steps=None):
        ...         return self.factor ** (step // self.every)
        >>> schedule = Staircase(every=10)
        >>> [schedule(step) for step in (0, 9, 10, 25)]
        [1.0, 1.0, 0.5, 0.25]
        >>> schedule
        Staircase(every=10, factor=0.5)
    """

    total_steps: int | None = None
    """The total given at construction; where it is None, calls bring theirs."""

    @abstractmethod
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Return the multiplier at ``step``. Every schedule writes this.

        Args:
            step: Number of steps attempted before this one, from 0.
            total_steps: Number of steps of the whole training; ``None`` or infinity where it is not known.

        Returns:
            A number >= 0.

        Raises:
            ValueError: If the total is needed and not known.
        """

    @property
    def needs_total(self) -> bool:
        """Whether a call without ``total_steps`` is an error."""
        return False

    def warmup_steps(self, total_steps: int | None = None) -> int:
        """Return the number of steps before the peak is reached."""
        return 0

    def plot(self, total_steps: int | None = None) -> Figure:
        """Draw the multiplier over the steps 0 to ``total_steps``.

        The figure stands alone: it belongs to no pyplot window and needs no closing.

        Args:
            total_steps: Number of steps to draw; may be left out where the schedule was constructed with a total.

        Returns:
            A ``matplotlib.figure.Figure`` with one axis.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If neither the call nor the schedule knows the total, or if it is below 1.

        Example:
            >>> from stability_callbacks.schedules import WarmupCosine
            >>> figure = WarmupCosine(warmup=100).plot(1000)
            >>> figure.axes[0].get_xlabel()
            'step'
            >>> figure.savefig("schedule.png")  # doctest: +SKIP
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`Schedule.plot` needs matplotlib: pip install 'stability-callbacks[plot]'") from error

        total = self.total_steps if self.total_steps is not None else total_steps
        if total is None:
            raise ValueError("`total_steps` must be an integer >= 1 to plot a schedule, got None")
        check_integer("total_steps", total, at_least=1)
        stride = -(-total // _PLOTTED_STEPS)
        # The corners are drawn where they are, whatever the stride.
        steps = sorted({*range(0, total, stride), min(self.warmup_steps(total), total), total})

        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axis = figure.add_subplot()
        axis.plot(steps, [self(step, total) for step in steps])
        axis.set(title=repr(self), xlabel="step", ylabel="multiplier", xlim=(0, total))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        return figure

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({arguments})"
