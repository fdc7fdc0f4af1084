"""Initialization of recurrent layers."""

from __future__ import annotations

from torch import Tensor, nn

from stability_callbacks._validation import check_number
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._initializers import Initializer, constant, orthogonal, xavier
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role
from stability_callbacks.initialization._policy import LeaveAlone, Policy

__all__ = ["Recurrent"]

_RECURRENT_LAYERS = (nn.RNNBase, nn.RNNCellBase)
_LSTMS = (nn.LSTM, nn.LSTMCell)


class Recurrent(Policy):
    r"""Initialization that lets gradients live through many time steps of an RNN, LSTM or GRU.

    Gate by gate: the hidden-to-hidden matrix is orthogonal, so it neither shrinks nor stretches what it carries from
    step to step; the input-to-hidden matrix is Xavier uniform. Biases are zero, but an LSTM's forget gate starts open:

    .. math:: W_{hh}^{(k)\top} W_{hh}^{(k)} = I, \qquad
        W_{ih}^{(k)} \sim U(-a, a),\; a = \sqrt{\tfrac{6}{I + H}}, \qquad
        b_{ih}^{(f)} + b_{hh}^{(f)} = \text{forget\_bias}

    For ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells: any number of layers, both directions. The projection of an
    LSTM with ``proj_size`` lies on the way from hidden to hidden and is (semi-)orthogonal too. A GRU, whose update gate
    averages, gets no such bias; nor does an LSTM with ``bias=False``, which has none to set: the report says so. Layers
    that are not recurrent are left alone: use :class:`Auto`, which does this and them.

    Args:
        forget_bias: Total bias of an LSTM's forget gate: torch adds two, and the input-to-hidden one holds it all.
            Default 1.0; sequences of hundreds of steps may want more.

    Raises:
        TypeError: If ``forget_bias`` is not a number.
        ValueError: If it is not finite.

    Example:
        >>> lstm = nn.LSTM(3, 2)
        >>> print(*(f"{row.name}: {row.what}" for row in Recurrent().apply(lstm)), sep="\n")
        weight_ih_l0: Xavier uniform per block (4), gain 1
        weight_hh_l0: orthogonal per block (4), gain 1
        bias_ih_l0: zeros, forget gate 1
        bias_hh_l0: zeros
        >>> lstm.bias_ih_l0.tolist()
        [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]

    References:
        Jozefowicz, Zaremba, Sutskever: An empirical exploration of recurrent network architectures (2015), ICML.
        Saxe, McClelland, Ganguli (2013), arXiv 1312.6120.
    """

    def __init__(self, forget_bias: float = 1.0) -> None:
        self.forget_bias = check_number("forget_bias", forget_bias)

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        if not isinstance(param.module, _RECURRENT_LAYERS):
            return LeaveAlone(f"{type(param.module).__name__} is not recurrent")
        if param.role is Role.KERNEL:
            return xavier(param, gain=1.0)
        if param.role is Role.HIDDEN_KERNEL:
            initializer = orthogonal(param, gain=1.0)
            biasless = isinstance(param.module, _LSTMS) and not param.module.bias and param.blocks > 1
            return (
                initializer._replace(what=f"{initializer.what}; no bias, so no forget bias")
                if biasless
                else initializer
            )
        if param.role is Role.BIAS:
            input_bias = isinstance(param.module, _LSTMS) and param.attribute.startswith("bias_ih")
            return self._input_bias() if input_bias and self.forget_bias else constant(0)
        return None

    def _input_bias(self) -> Initializer:
        """The bias of an LSTM: gates are input, forget, cell, output."""

        def draw(tensor: Tensor) -> None:
            tensor.zero_()
            tensor.chunk(4)[1].fill_(self.forget_bias)

        return Initializer(f"zeros, forget gate {self.forget_bias:g}", draw)
