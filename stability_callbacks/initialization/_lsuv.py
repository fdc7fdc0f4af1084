"""Initialization by data: layers are scaled until a batch keeps its size through them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.weight_norm import WeightNorm

from stability_callbacks._validation import check_instance, check_integer, check_number
from stability_callbacks.activations import ModuleCall, OutputHooks
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._initializers import Initializer, constant, orthogonal
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role, layer_parameters
from stability_callbacks.initialization._policy import LeaveAlone, Policy
from stability_callbacks.initialization._report import InitReport
from stability_callbacks.initialization._tracing import preserved_randomness

__all__ = ["LSUV"]

_LAYERS = (nn.Linear, _ConvNd)

_MADE_BY_HOOK = "its weight is no parameter: a hook makes it"


class _Outcome(NamedTuple):
    """How the scaling of a layer went: the standard deviation of its output at last, and what is wrong, if anything."""

    std: float
    trouble: str | None


class LSUV(Policy):
    r"""Layer-sequential unit variance: orthogonal weights, then scaled so that a real batch keeps variance 1.

    Layer by layer, in the order of the forward pass,

    .. math:: W \leftarrow W / \sqrt{\operatorname{Var}(\text{output})} \quad \text{until} \quad
        |\operatorname{Var}(\text{output}) - 1| \le \text{tolerance}

    It needs no theory of the activations, so it fits where :class:`Auto`'s does not: unusual activations, inputs that
    are not standardized, branches that add up. Written to linear layers, convolutions and transposed convolutions,
    whose biases become zero; all else is left alone. One forward pass without gradients is made, in the mode the model
    is in; buffers (the statistics of batch norm) and random states are put back.

    Weight normalization is scaled by its magnitudes: the parametrization's, and those of the older
    ``torch.nn.utils.weight_norm``, whose directions stay as they are.

    A layer that does not converge is named in a warning and in the report: one whose output is constant, whose weight
    cannot be scaled (``spectral_norm``) or is made by a hook, or that the forward pass does not call.

    Args:
        tolerance: Largest deviation of the variance from 1, > 0. Default 0.1.
        max_iterations: How often a layer is scaled at most, >= 1. Default 10.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of bounds. When applied: without a batch, or to a sharded model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
        >>> batch = 100 * torch.rand(64, 20)
        >>> report = LSUV().apply(model, batch)
        >>> print(report["2.weight"].what)
        orthogonal, gain 1, then scaled: output std 1
        >>> round(model[:3](batch).std().item(), 2)
        1.0

    References:
        Mishkin, Matas: All you need is a good init (2015), arXiv 1511.06422.
    """

    needs_batch: ClassVar[bool] = True

    def __init__(self, tolerance: float = 0.1, max_iterations: int = 10) -> None:
        self.tolerance = check_number("tolerance", tolerance, above=0)
        self.max_iterations = check_integer("max_iterations", max_iterations, at_least=1)

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        if not isinstance(param.module, _LAYERS):
            return None
        if param.role is Role.KERNEL:
            return orthogonal(param, gain=1.0)
        return constant(0) if param.role is Role.BIAS else None

    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        """Initialize a model in place, with the help of a batch.

        Args:
            model: The model. Nothing but its parameters changes.
            batch: What its ``forward`` takes: a tensor; a tuple or list, whose first element is taken, as in
                ``(inputs, targets)``; or a mapping of keyword arguments.

        Returns:
            What was done to each parameter.

        Raises:
            TypeError: If ``model`` is not a module.
            ValueError: If there is no batch, or the model is sharded.
        """
        if batch is None:
            raise ValueError(
                "`batch` must be a batch of inputs for LSUV, which scales layers by their outputs; got None"
            )
        check_instance("model", model, nn.Module, "a torch.nn.Module")
        if any(isinstance(each, DTensor) for each in model.parameters()):
            raise ValueError(
                "`model` must not be sharded for LSUV, which scales weights between layers: apply it before"
            )
        report = super().apply(model)
        kernels: dict[nn.Module, LayerParameter] = {
            param.module: param
            for param in layer_parameters(model)
            if isinstance(param.module, _LAYERS) and param.role is Role.KERNEL and report[param.name].initialized
        }
        kernels |= {
            param.module: param for param in layer_parameters(model) if _is_magnitude(param) and param.obstacle is None
        }
        outcomes = self._scale(model, batch, kernels)
        return _completed(report, list(kernels.values()), outcomes, _made_by_hooks(model, kernels))

    @torch.no_grad()
    def _scale(self, model: nn.Module, batch: Any, kernels: Mapping[nn.Module, LayerParameter]) -> dict[str, _Outcome]:
        outcomes: dict[str, _Outcome] = {}

        def adjust(call: ModuleCall) -> Tensor | None:
            if call.name in outcomes:  # a layer that is called again keeps what its first call found
                return None
            param = kernels[call.module]
            output, outcomes[call.name] = self._scale_layer(param, call.args, call.kwargs, call.output)
            return output

        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with ExitStack() as stack:
            stack.enter_context(preserved_randomness())
            layers = [(param.name, layer) for layer, param in kernels.items()]
            stack.enter_context(OutputHooks(layers, adjust, prepend=True))
            for buffer, value in buffers:
                stack.callback(buffer.copy_, value)
            _call(model, batch)
        return outcomes

    def _scale_layer(self, param: LayerParameter, args: Any, kwargs: Any, output: Tensor) -> tuple[Tensor, _Outcome]:
        """Scale a layer until its output has variance 1; the output goes on to the next."""
        for _ in range(self.max_iterations):
            std = _std(output)
            if abs(std**2 - 1) <= self.tolerance:
                return output, _Outcome(std, None)
            if std == 0 or not math.isfinite(std):
                return output, _Outcome(std, "its output is constant" if std == 0 else "its output is not finite")
            param.write(param.read() / std)
            if (hook := _weight_norm(param.module)) is not None:
                param.module.weight = hook.compute_weight(param.module)
            output = param.module.forward(*args, **kwargs)
        std = _std(output)
        converged = abs(std**2 - 1) <= self.tolerance
        return output, _Outcome(std, None if converged else "its output did not follow the weight")


def _weight_norm(module: nn.Module) -> WeightNorm | None:
    """The hook of the older weight normalization, which computes a layer's weight before each call; None if none."""
    hooks = module._forward_pre_hooks.values()
    return next((each for each in hooks if isinstance(each, WeightNorm) and each.name == "weight"), None)


def _is_magnitude(param: LayerParameter) -> bool:
    return (
        isinstance(param.module, _LAYERS) and param.attribute == "weight_g" and _weight_norm(param.module) is not None
    )


def _made_by_hooks(model: nn.Module, kernels: Mapping[nn.Module, LayerParameter]) -> dict[str, str]:
    """The layers whose weight is no parameter, with one of its parameters, and what makes it."""
    found: dict[str, str] = {}
    for param in layer_parameters(model):
        layer = param.module
        if not isinstance(layer, _LAYERS) or layer in kernels or not param.attribute.startswith("weight_"):
            continue
        frozen = not any(each.requires_grad for each in layer.parameters(recurse=False))
        if "weight" not in layer._parameters and not hasattr(layer, "parametrizations") and not frozen:
            found.setdefault(".".join(filter(None, (param.module_name, "weight"))), param.name)
    return found


def _std(output: Tensor) -> float:
    return float(output.to(torch.promote_types(output.dtype, torch.float32)).std(correction=0))


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, tuple | list) else batch)


def _completed(
    report: InitReport,
    kernels: list[LayerParameter],
    outcomes: Mapping[str, _Outcome],
    made_by_hooks: Mapping[str, str],
) -> InitReport:
    """The report with what the scaling did, and a warning about the layers that it could not scale."""
    rows = {row.name: row for row in report}
    troubles = []
    for name, parameter in made_by_hooks.items():
        troubles.append(f"{name} ({_MADE_BY_HOOK})")
        rows[parameter] = rows[parameter]._replace(what=f"left alone: {_MADE_BY_HOOK}")
    for param in kernels:
        std, trouble = outcomes.get(param.name, _Outcome(math.nan, "the forward pass did not call its layer"))
        if trouble is not None:
            troubles.append(f"{param.name} ({trouble})")
        note = f"then scaled: output std {std:.3g}" if trouble is None else f"not scaled to variance 1: {trouble}"
        mean_after, std_after = param.statistics()
        row = rows[param.name]
        what = f"{row.what}, {note}" if row.initialized else note.removeprefix("then ")
        rows[param.name] = row._replace(what=what, mean_after=mean_after, std_after=std_after)
    if troubles:
        warnings.warn(f"LSUV did not bring these layers to variance 1: {', '.join(troubles)}.", stacklevel=3)
    return InitReport(tuple(rows.values()))
