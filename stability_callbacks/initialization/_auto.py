"""The policy that chooses by layer type and the activation that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from stability_callbacks._validation import check_number
from stability_callbacks.activations import named_modules
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._initializers import Initializer, constant, kaiming, normal, xavier
from stability_callbacks.initialization._kernels import activation_of
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role
from stability_callbacks.initialization._policy import LeaveAlone, Plan, Policy
from stability_callbacks.initialization._recurrent import Recurrent

__all__ = ["Auto"]


class Auto(Policy):
    r"""Initialization by layer type and the activation that follows: the one to start with.

    ================================= ================================================================================
    layer                             what it gets
    ================================= ================================================================================
    linear, bilinear, convolution of  Before an activation that rectifies (ReLU and its kin, GELU, SiLU, ELU, SELU,
    any rank, transposed convolution  Mish): Kaiming normal, ``fan_in``, with its gain. Before tanh and its kin, or no
                                      known activation: Xavier uniform, with its gain, or 1. Biases zero
    RNN, LSTM, GRU and their cells    :class:`Recurrent`
    multi-head attention              query, key and value projections Xavier uniform, each by itself; biases zero
    embedding                         normal with std :math:`1/\sqrt{d}`: rows of norm 1, and logits of variance 1 where
                                      it is tied to the last layer; the padding row zero
    norms of ``torch.nn``             scale 1, shift 0
    ``PReLU``, layers of your own     left alone
    ================================= ================================================================================

    Gains are those of :class:`Kaiming`. The activation that follows is read from the model's ``forward`` methods with
    ``torch.fx``, each module by itself, so functions (``F.relu(x)``, ``x.tanh()``) are seen, as are activations behind
    a norm, dropout, pooling, a residual addition or the border of a module. Where a ``forward`` cannot be read, the
    order in which its module registered its children stands in for it; where that does not tell either, the layer
    counts as linear: Xavier, gain 1. The report names the activation that was found.

    A part of the model that bears the name of a pretrained checkpoint it came from (as models of Hugging Face do, in
    ``config._name_or_path``) is left alone. Other pretrained weights cannot be told from random ones: freeze them, or
    name what to initialize with :class:`ByPattern`.

    Args:
        forget_bias: See :class:`Recurrent`.

    Raises:
        TypeError: If ``forget_bias`` is not a number.
        ValueError: If it is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))
        >>> for row in Auto().apply(model):
        ...     print(f"{row.name}: {row.what}")
        0.weight: Kaiming normal, fan_in 64, gain 1.53 (before GELU)
        0.bias: zeros
        1.weight: ones
        1.bias: zeros
        3.weight: Xavier uniform, gain 1 (no activation found after it)
        3.bias: zeros

    References:
        He, Zhang, Ren, Sun (2015), arXiv 1502.01852. Glorot, Bengio (2010), AISTATS.
        Klambauer, Unterthiner, Mayr, Hochreiter: Self-normalizing neural networks (2017), arXiv 1706.02515.
    """

    def __init__(self, forget_bias: float = 1.0) -> None:
        self.forget_bias = check_number("forget_bias", forget_bias)

    def plan(self, model: nn.Module) -> Plan:
        origins = _pretrained_parts(model)
        plan = dict(super().plan(model))
        for name in plan:
            origin = next((origins[around] for around in _around(name) if around in origins), None)
            if origin is not None:
                plan[name] = LeaveAlone(f"pretrained, from {origin}")
        return plan

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        if isinstance(param.module, nn.RNNBase | nn.RNNCellBase):
            return Recurrent(self.forget_bias).rule(param, call_graph)
        if param.role is Role.KERNEL:
            activation = activation_of(param, call_graph)
            scheme = xavier if activation.saturating else kaiming
            return scheme(param, activation.gain).because(activation)
        if param.role is Role.EMBEDDING:
            assert param.shape is not None
            return normal(param, std=1 / math.sqrt(param.shape[-1]))
        constants = {Role.BIAS: 0.0, Role.NORM_SCALE: 1.0, Role.NORM_SHIFT: 0.0}
        return constant(constants[param.role]) if param.role in constants else None


def _pretrained_parts(model: nn.Module) -> dict[str, str]:
    """The parts of a model that know which checkpoint they were loaded from, and which it was."""
    origins = {
        name: getattr(getattr(module, "config", None), "_name_or_path", None)
        for name, module in named_modules(model, remove_duplicate=False)
    }
    return {name: origin for name, origin in origins.items() if isinstance(origin, str) and origin}


def _around(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
