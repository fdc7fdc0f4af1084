"""What every clip rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from stability_callbacks.gradient_pass import GradientNorms, Parameters, combine_norms, measure_gradients
from stability_callbacks.schedules import Schedule

__all__ = ["ClipResult", "ClipRule"]


class ClipResult(NamedTuple):
    """What a clip rule did, as 0-dim tensors on the gradients' device.

    Attributes:
        norm: Total gradient norm before the rule.
        clipped_norm: Total gradient norm after it; the same where ``norm`` is not finite.
        coefficient: The factor applied to the total norm, in ``(0, 1]``; 1 where nothing was clipped.
    """

    norm: Tensor
    clipped_norm: Tensor
    coefficient: Tensor

    @classmethod
    def between(cls, norm: Tensor, clipped_norm: Tensor) -> ClipResult:
        """The result of a rule that knows the norms but has no one factor; a non-finite norm was not clipped."""
        clipped_norm = torch.where(torch.isfinite(norm), clipped_norm, norm)
        ratio = clipped_norm / norm
        # 0 / 0 and inf / inf are steps in which nothing was clipped; the quotient of equal norms is exactly 1.
        return cls(norm, clipped_norm, torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio)))

    @classmethod
    def from_parts(cls, norm: Tensor, parts: Tensor, factors: Tensor, norm_type: float = 2.0) -> ClipResult:
        """The result of a rule that clips parts of the gradients, each by itself.

        The norms of parts add up to one that may round otherwise than ``norm`` does. Where nothing was clipped the
        result says so exactly.

        Args:
            norm: Total norm before the rule.
            parts: Norms after it of parts that make up the whole, ``[K]``.
            factors: What gradients were multiplied by, in any grouping.
            norm_type: The ``p`` of the norms.
        """
        clipped_norm = torch.minimum(combine_norms(parts, norm_type).to(norm.dtype), norm)
        return cls.between(norm, torch.where((factors < 1).any(), clipped_norm, norm))


class ClipRule(ABC):
    """A rule that shrinks gradients in place. It acts on finite gradients only.

    Derive from it and write :meth:`clip_` to make a rule of your own. What a rule owes:

    - It shrinks gradients in place, and its :class:`ClipResult` says by how much: exactly 1 where it changed nothing.
    - It leaves every gradient as it is, to the bit, in a step whose total norm is not finite, and learns nothing from
      it: whether such a step is bad is for a detector to say. A step that is skipped on the device reaches a rule in
      the same way, with its norms masked by NaN. A norm of zero, and a step without gradients, teach it nothing either.
    - It never waits for the device: no ``.item()``, ``float(tensor)`` or ``if tensor``; choose with ``torch.where``.
    - Where it remembers something, :meth:`state_dict` and :meth:`load_state_dict` hold all of it, as copies, in what
      ``torch.load(weights_only=True)`` takes, so that an interrupted run goes on bit for bit. Pickles and deep copies
      behave like the original: each optimizer gets a copy of the rule.
    - Its ``repr`` shows the settings and nothing that changes with use. That of this class shows the attributes whose
      names begin without an underscore.
    - It takes the total norm and the norms of tensors from :meth:`measure`, which are those of whole tensors where
      these are sharded, and scales with :func:`~stability_callbacks.gradient_pass.scale_gradients_` or
      :func:`~stability_callbacks.gradient_pass.scale_each_gradient_`, which take every layout.

    Attributes:
        norm_type: The ``p`` of the norm that the rule reads. Default 2.
        linear: Whether the rule only multiplies gradients by factors found from the norms that it is given. Then it
            works on gradients that still carry a loss scale, given the unscaled norms. Default False.

    Example:
        A rule of your own that clips to a multiple of the mean of the norms so far:

        >>> from stability_callbacks.clipping import ClipResult, ClipRule
        >>> from stability_callbacks.gradient_pass import named_gradients, scale_gradients_
        >>> class MeanClip(ClipRule):
        ...     linear = True
        ...
        ...     def __init__(self, factor=2.0):
        ...         self.factor = factor
        ...         self._sum = torch.zeros((), dtype=torch.float64)
        ...         self._count = torch.zeros((), dtype=torch.float64)
        ...
        ...     @torch.no_grad()
        ...     def clip_(self, parameters, norms=None):
        ...         pairs = named_gradients(parameters)
        ...         norm = self.measure(pairs, norms).total
        ...         usable = torch.isfinite(norm) & (norm > 0)
        ...         total, count = self._sum.to(norm.device), self._count.to(norm.device)
        ...         threshold = torch.where(count > 0, self.factor * total / count, torch.inf).to(norm.dtype)
        ...         coefficient = torch.where(usable, (threshold / norm).clamp(max=1.0), 1.0)
        ...         self._sum = total + torch.where(usable, norm * coefficient, 0.0)
        ...         self._count = count + usable
        ...         scale_gradients_(pairs, coefficient)
        ...         return ClipResult(norm, norm * coefficient, coefficient)
        ...
        ...     def state_dict(self):
        ...         return {"sum": self._sum.clone(), "count": self._count.clone()}
        ...
        ...     def load_state_dict(self, state_dict):
        ...         self._sum, self._count = state_dict["sum"].clone(), state_dict["count"].clone()
        >>> rule, weight = MeanClip(factor=2.0), torch.nn.Parameter(torch.zeros(1))
        >>> for norm in (1.0, 1.0, 50.0):
        ...     weight.grad = torch.tensor([norm])
        ...     _ = rule.clip_([weight])
        >>> rule, weight.grad
        (MeanClip(factor=2.0), tensor([2.]))
    """

    norm_type: float = 2.0
    linear: ClassVar[bool] = False

    def __repr__(self) -> str:
        # Checkpoints find a callback's state by its policies' representation, so it must not hold an address.
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        """Clip the gradients in place, without waiting for the device. Every rule writes this.

        Args:
            parameters: Parameters, or ``(name, parameter)`` pairs, which rules that go by name need.
            norms: The gradients' norms of this rule's ``norm_type`` where they are known; else they are measured.

        Returns:
            The total norm before and after, and the coefficient.

        Raises:
            ValueError: If the norms given are of another type than the rule's.
        """

    def measure(self, parameters: Parameters, norms: GradientNorms | None = None) -> GradientNorms:
        """The norms that the rule reads: those given, if they are of its type, else measured now."""
        if norms is None:
            return measure_gradients(parameters, self.norm_type)
        if norms.norm_type != self.norm_type:
            raise ValueError(f"`norms` must be of norm_type {self.norm_type:g} for {self!r}, got {norms.norm_type:g}")
        return norms

    def assign(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Learn which parameters there are, before training; most rules need not know.

        Args:
            parameters: All that are trained, with their full names, in the order of the model's definition: those of
                other optimizers and without gradients too.

        Raises:
            ValueError: If the rule does not fit them.
        """

    @property
    def schedules(self) -> Sequence[Schedule]:
        """The schedules that the rule follows."""
        return ()

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        """Say which step comes next, for rules that follow a schedule; without being told they count calls of `clip_`.

        Args:
            step: Number of steps attempted before it, skipped ones included.
            total_steps: Number of steps of the whole training; None where it is not known.

        Raises:
            ValueError: If a schedule can't serve for that training.
        """

    @property
    def threshold(self) -> float | Tensor | None:
        """The threshold in force, for logs; None where a rule has no single one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers; empty for a rule without memory."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`."""
