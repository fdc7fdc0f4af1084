"""What a fault is: what goes wrong, with which value, when and where."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from stability_callbacks._validation import check_choice, check_integer, check_number, check_pattern

T = TypeVar("T")

__all__ = ["Fault", "Injection"]

Target = Literal["activation", "buffer", "gradient", "input", "learning_rate", "loss", "optimizer_state", "weight"]
NonFiniteValue = Literal["nan", "inf", "-inf"]

# Of these there is only one in a step, so there is nothing to choose.
_WITHOUT_PLACE = ("learning_rate", "loss")


class Fault:
    r"""Something that goes wrong in some steps of training, on purpose.

    What is drawn (the tensor, its element, whether a step is hit) comes from a random stream of the fault's own, made
    anew for each step from ``seed``, the step and what the fault is. So it is the same in every run, on every process
    and after a resume, faults that differ draw independently, and no global random state is touched.

    Args:
        target: What goes wrong. A tensor and an element of it are drawn where there are several.

            - ``"input"``: a floating-point tensor of the batch, in any nesting; for this step only.
            - ``"activation"``: the output of a module.
            - ``"gradient"``: the gradient of a parameter, after the backward pass.
            - ``"weight"``, ``"buffer"``, ``"optimizer_state"``: before the forward pass; it stays. The optimizer's
              counts of steps are left alone.
            - ``"loss"``: the loss, and so all gradients.
            - ``"learning_rate"``: the learning rate of all parameter groups, for the step.
        value: ``"nan"`` (default), ``"inf"`` or ``"-inf"`` take the place of one element of the tensor; a finite number
            multiplies all of it. The loss is multiplied in any case, the learning rate only by numbers > 0.
        steps: The steps that it hits: one, or a sequence of them, such as a ``range``. They count from 0.
        probability: Or how likely it is to hit any one step, in ``(0, 1]``. One of ``steps`` and ``probability`` is
            given.
        where: Regular expression, searched in the full name of what may be hit: parameter, buffer, module, place in the
            batch as one writes it in Python (``batch``, ``batch[0]``, ``batch['image']``, ``batch.mask`` of a named
            tuple or dataclass; the expression for one of these alone is ``r"^batch\['image'\]$"``), or parameter and
            kind of optimizer state (``head.weight.exp_avg``). Default: anything; for activations, the modules that hold
            no others.
        rank: The only process that it hits. Default: all, with the same draws.
        seed: Seed of the draws, >= 0. Default 0.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range, not both or neither of ``steps`` and ``probability`` are given,
            or the target can't take the value or has no place to choose.

    Example:
        >>> fault = Fault("gradient", "inf", steps=[3, 7], where=r"head\.weight")
        >>> fault.is_due(3), fault.is_due(4)
        (True, False)
        >>> often = Fault("input", 1e4, probability=0.1)
        >>> sum(map(often.is_due, range(1000)))
        100
    """

    def __init__(
        self,
        target: Target,
        value: float | NonFiniteValue = "nan",
        steps: int | Sequence[int] | None = None,
        probability: float | None = None,
        where: str | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        self.target: Target = check_choice("target", target, get_args(Target))
        self.value = _check_value(self.target, value)
        if (steps is None) == (probability is None):
            raise ValueError(
                "one of `steps` and `probability` must be given, got "
                f"{'neither' if steps is None else f'steps={steps!r} and probability={probability!r}'}"
            )
        self.steps = None if steps is None else _check_steps(steps)
        self.probability = None if probability is None else check_number("probability", probability, above=0, at_most=1)
        self.where = where
        self._pattern = None if where is None else check_pattern("where", where)
        if where is not None and target in _WITHOUT_PLACE:
            raise ValueError(f"`where` must be None for the target {target!r}, which is one thing only, got {where!r}")
        self.rank = None if rank is None else check_integer("rank", rank, at_least=0)
        self.seed = check_integer("seed", seed, at_least=0)

    def __repr__(self) -> str:
        # Checkpoints find a callback's state by its policies' representation, so it must not hold an address.
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({settings})"

    @property
    def factor(self) -> float:
        """The value as a number."""
        return float(self.value)

    def is_due(self, step: int) -> bool:
        """Whether the fault hits a step.

        Args:
            step: Number of steps before it.
        """
        if self.probability is not None:
            return self.stream(step, "when").random() < self.probability
        return step == self.steps if isinstance(self.steps, int) else step in (self.steps or ())

    def hits(self, rank: int) -> bool:
        """Whether the fault hits a process."""
        return self.rank is None or self.rank == rank

    def fits(self, name: str) -> bool:
        """Whether the fault may hit what bears a name."""
        return self._pattern is None or self._pattern.search(name) is not None

    def stream(self, step: int, purpose: str) -> random.Random:
        """The random stream that decides one thing in one step."""
        return random.Random(repr((self.seed, step, self.target, self.value, self.where, purpose)))


class Injection(NamedTuple):
    """A fault that was put into training.

    Attributes:
        step: The step, counted from 0.
        target: What went wrong, see :class:`Fault`.
        value: The value put in, or the factor.
        where: The full name of what was hit: parameter, buffer, module, place in the batch, optimizer.
        rank: The only process that was hit; None for all.
    """

    step: int
    target: str
    value: float | str
    where: str
    rank: int | None = None

    def __str__(self) -> str:
        what = f"{self.target} {self.where}" if self.where else self.target
        change = f"{self.value} into" if isinstance(self.value, str) else f"factor {self.value:g} on"
        return f"{change} {what} in step {self.step}{'' if self.rank is None else f' on rank {self.rank}'}"


def draw(stream: random.Random, items: Sequence[T]) -> T:
    """One of several items; unlike ``stream.choice`` the same in all versions of Python."""
    return items[int(stream.random() * len(items))]


def _check_value(target: str, value: Any) -> float | NonFiniteValue:
    allowed = get_args(NonFiniteValue)
    if target == "learning_rate":
        if isinstance(value, str):
            raise ValueError(f"`value` must be a number > 0 for the target {target!r}, got {value!r}")
        return check_number("value", value, above=0)
    if isinstance(value, Real) and not math.isfinite(value):
        value = str(float(value))
    if isinstance(value, str):
        if value not in allowed:
            raise ValueError(f"`value` must be {', '.join(map(repr, allowed))} or a number, got {value!r}")
        return check_choice("value", value, allowed)
    return check_number("value", value)


def _check_steps(steps: Any) -> int | Sequence[int]:
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        return check_integer("steps", steps, at_least=0)
    if not steps:
        raise ValueError(f"`steps` must hold at least one step, got {steps!r}")
    if isinstance(steps, range):
        check_integer("steps", min(steps[0], steps[-1]), at_least=0)
        return steps
    return [check_integer(f"steps[{index}]", step, at_least=0) for index, step in enumerate(steps)]
