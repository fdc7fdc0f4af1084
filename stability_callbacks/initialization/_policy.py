"""What every initialization policy is: a plan of what to write into which parameter, and its careful execution."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from stability_callbacks._validation import check_instance
from stability_callbacks.activations import refuse_unreachable
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._initializers import Initializer
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role, layer_parameters
from stability_callbacks.initialization._report import InitReport, InitRow

__all__ = ["LeaveAlone", "Plan", "Policy"]


class LeaveAlone(NamedTuple):
    """Why a parameter is not written."""

    why: str


Plan = Mapping[str, Initializer | LeaveAlone]
"""What to do with each parameter, by its full name."""


class Policy(ABC):
    """An initialization policy: what to write into which parameter of a model.

    Derive from it and write :meth:`rule` to make one of your own. What a policy owes:

    - :meth:`rule` decides by the parameter alone, remembers nothing and draws no random numbers: those come from the
      initializer that it returns, so that a seed gives the same weights, also by a copy or a pickle.
    - Its ``repr`` shows its settings: that of this class shows the attributes whose names begin without an underscore.
    - One that overrides :meth:`apply` to look at outputs sets :attr:`needs_batch`, raises a ``ValueError`` without a
      batch and for a sharded model, and changes nothing but parameters.

    What all policies get from this class:

    - Parameters keep their identity: values are copied in place, so optimizers and hooks go on to hold them.
    - A tied parameter is initialized once, by the first of its names for which the policy has a rule. A frozen one
      (``requires_grad=False``) is left alone.
    - A parametrised weight (``weight_norm``, ``spectral_norm``, ``orthogonal`` of
      ``torch.nn.utils.parametrizations``) is initialized through the ``right_inverse`` of its parametrizations, and
      left alone where they have none. The estimate of ``spectral_norm`` is brought up to date.
    - Values are drawn on the CPU from torch's default generator, in float32 or better, and cast: a seed gives the same
      weights on any device and in any precision. Each process of a sharded model (``fully_shard``) draws the whole
      tensor, one at a time, and keeps its shard: all must draw from the same seed.
    - A lazy parameter, which has no shape yet, is left alone with a warning.
    - A padding row of an embedding stays zero.

    Example:
        A policy of your own, that writes biases only:

        >>> from stability_callbacks.initialization import Policy, Role, constant
        >>> class SmallBiases(Policy):
        ...     def __init__(self, value=0.01):
        ...         self.value = value
        ...
        ...     def rule(self, param, call_graph):
        ...         return constant(self.value) if param.role is Role.BIAS else None
        >>> report = SmallBiases().apply(nn.Linear(2, 3))
        >>> print(report["bias"].what)
        0.01
        >>> print(report["weight"].what)
        left alone: kernel kept, SmallBiases has no rule for it
    """

    needs_batch: ClassVar[bool] = False
    """Whether :meth:`apply` needs a batch."""

    @abstractmethod
    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        """Say what to write into a parameter.

        Args:
            param: The parameter in its place: name, layer, shape, role, fans.
            call_graph: How the layers are connected, for :func:`activation_after`.

        Returns:
            What to write; None or the reason why the parameter is left alone.
        """

    def plan(self, model: nn.Module) -> Plan:
        """Say what to do with each parameter of a model that can be written, by its full name."""
        call_graph = CallGraph(model)
        plan: dict[str, Initializer | LeaveAlone] = {}
        for param in layer_parameters(model):
            if param.obstacle is None:
                plan[param.name] = self.rule(param, call_graph) or LeaveAlone(_why_no_rule(self, param))
        return plan

    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        """Initialize a model in place.

        Args:
            model: The model. Nothing but its parameters changes.
            batch: A batch of inputs, for policies that look at data; the others ignore it.

        Returns:
            What was done to each parameter.

        Raises:
            TypeError: If ``model`` is not a module.
            ValueError: If a parameter is on the meta device, or sharded by FSDP1 or DeepSpeed ZeRO-3; nothing has been
                written then.
        """
        check_instance("model", model, nn.Module, "a torch.nn.Module")
        refuse_unreachable(model)
        return _carry_out(self.plan(model), model)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({arguments})"


def _why_no_rule(policy: Policy, param: LayerParameter) -> str:
    if param.role is Role.UNKNOWN:
        return f"not a parameter that {type(param.module).__name__} is known for"
    return f"{param.role.value} kept, {type(policy).__name__} has no rule for it"


@torch.no_grad()
def _carry_out(plan: Plan, model: nn.Module) -> InitReport:
    all_slots = list(layer_parameters(model))
    owners = _owners(all_slots, plan)
    rows = [_carry_out_one(param, plan, owners) for param in all_slots]
    lazy = [param.name for param in all_slots if param.shape is None]
    if lazy:
        warnings.warn(
            f"These parameters are lazy and were not initialized: {', '.join(lazy)}. Run a batch through the model"
            " first, in `configure_model` for instance.",
            stacklevel=3,
        )
    return InitReport(tuple(rows))


def _owners(all_slots: list[LayerParameter], plan: Plan) -> dict[int, str]:
    """The name under which each tensor is initialized: its first that the plan writes, or its first."""
    owners: dict[int, str] = {}
    writers = [param for param in all_slots if isinstance(plan.get(param.name), Initializer)]
    for param in (*writers, *all_slots):
        for tensor in param.tensors:
            owners.setdefault(id(tensor), param.name)
    return owners


def _carry_out_one(param: LayerParameter, plan: Plan, owners: dict[int, str]) -> InitRow:
    before = param.statistics()
    step = plan.get(param.name)
    owner = next((owners[id(tensor)] for tensor in param.tensors), param.name)
    if param.obstacle is not None:
        step = LeaveAlone(param.obstacle)
    elif owner != param.name:
        step = LeaveAlone(f"tied to {owner}")
    if isinstance(step, Initializer):
        step = _fill(param, step)
    what = step.what if isinstance(step, Initializer) else f"left alone: {step.why if step else 'not in the plan'}"
    after = param.statistics() if isinstance(step, Initializer) else before
    return InitRow(param.name, param.shape, what, *before, *after)


def _fill(param: LayerParameter, initializer: Initializer) -> Initializer | LeaveAlone:
    assert param.shape is not None
    value = torch.empty(param.shape, dtype=torch.promote_types(param.tensors[0].dtype, torch.float32))
    initializer.draw(value)
    try:
        param.write(value)
    except NotImplementedError:  # what a parametrization raises that cannot be assigned to
        return LeaveAlone("its parametrization cannot be assigned to")
    if param.parametrization is None:
        return initializer
    return initializer._replace(
        what=f"{initializer.what}; through {', '.join(type(each).__name__ for each in param.parametrization)}"
    )
