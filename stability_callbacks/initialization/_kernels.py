"""Policies that treat every linear map alike: Xavier, Kaiming, orthogonal, normal and truncated normal."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from stability_callbacks._validation import check_choice, check_number
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._following import activation_after
from stability_callbacks.initialization._gain import ACTIVATION_NAMES, NO_ACTIVATION, Activation, named_activation
from stability_callbacks.initialization._initializers import (
    DISTRIBUTIONS,
    FANS,
    Distribution,
    Fan,
    Initializer,
    constant,
    kaiming,
    normal,
    orthogonal,
    trunc_normal,
    xavier,
)
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role
from stability_callbacks.initialization._policy import Policy

__all__ = ["Kaiming", "Normal", "Orthogonal", "TruncNormal", "Xavier", "activation_of"]

# Attention projections and recurrent matrices have their activations inside the layer.
_FEED_FORWARD_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd)


def activation_of(param: LayerParameter, call_graph: CallGraph) -> Activation:
    """The activation that a kernel's layer leads to."""
    known = isinstance(param.module, _FEED_FORWARD_LAYERS)
    return activation_after(call_graph, param.module_name) if known else NO_ACTIVATION


class _KernelPolicy(Policy):
    """Writes kernels by one rule and zeros into their biases."""

    roles: ClassVar[frozenset[Role]] = frozenset({Role.KERNEL, Role.HIDDEN_KERNEL})

    @abstractmethod
    def kernel(self, param: LayerParameter, call_graph: CallGraph) -> Initializer:
        """What to write into a kernel."""

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | None:
        if param.role in self.roles:
            return self.kernel(param, call_graph)
        return constant(0) if param.role is Role.BIAS else None


class Xavier(_KernelPolicy):
    r"""Xavier initialization (Glorot): keeps the signal's variance in both directions through tanh-like layers.

    .. math:: W \sim U(-a, a), \quad a = \text{gain} \sqrt{\frac{6}{\text{fan\_in} + \text{fan\_out}}}
        \qquad \text{or} \qquad W \sim N\Big(0, \text{gain}^2 \frac{2}{\text{fan\_in} + \text{fan\_out}}\Big)

    Written to each linear map by itself: linear and bilinear layers, convolutions of all ranks and their transposes,
    attention projections (query, key and value apart), recurrent matrices (gate by gate). Biases become zero. Norms and
    embeddings are left alone. Use it where tanh, sigmoid or no activation follows; :class:`Auto` chooses for you.

    Args:
        distribution: ``"uniform"`` (default) or ``"normal"``.
        gain: Factor on the standard deviation, > 0. None (default): from the activation that follows the layer; 1 where
            none is found.

    Raises:
        TypeError: If ``gain`` is not a number.
        ValueError: If ``gain`` is not positive, or ``distribution`` is another.

    Example:
        >>> model = nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 10))
        >>> for row in Xavier().apply(model):
        ...     print(row.name, row.what)
        0.weight Xavier uniform, gain 1.67 (before Tanh)
        0.bias zeros
        2.weight Xavier uniform, gain 1 (no activation found after it)
        2.bias zeros

    References:
        Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks (2010), AISTATS.
    """

    def __init__(self, distribution: Distribution = "uniform", gain: float | None = None) -> None:
        self.distribution = check_choice("distribution", distribution, DISTRIBUTIONS)
        self.gain = None if gain is None else check_number("gain", gain, above=0)

    def kernel(self, param: LayerParameter, call_graph: CallGraph) -> Initializer:
        if self.gain is not None:
            return xavier(param, self.gain, self.distribution)
        activation = activation_of(param, call_graph)
        return xavier(param, activation.gain, self.distribution).because(activation)


class Kaiming(_KernelPolicy):
    r"""Kaiming initialization (He): keeps the signal's size through layers that rectify.

    .. math:: W \sim N\Big(0, \frac{\text{gain}^2}{\text{fan}}\Big) \qquad \text{or} \qquad
        W \sim U(-a, a), \quad a = \text{gain} \sqrt{\frac{3}{\text{fan}}}

    The gain of an activation ``f`` is :math:`(\mathbb{E}_{z \sim N(0,1)} f(z)^2)^{-1/2}`: :math:`\sqrt 2` for ReLU,
    :math:`\sqrt{2 / (1 + s^2)}` for a leaky one of slope ``s``, 1.53 for GELU, 1.68 for SiLU, 1 for SELU (which makes
    this LeCun's scheme); tanh has 5/3 and sigmoid 1, by convention. Written to the same layers as :class:`Xavier`.

    ReLU keeps any size of signal, GELU, SiLU and Mish only one near 1: through 30 layers of 256 units without a norm,
    GELU's grew by 2 to 3 and SiLU's by 20 to 40 in measurements. Beyond ten such layers use norms, or :class:`LSUV`.

    Args:
        mode: ``"fan_in"`` (default) keeps the size of activations, ``"fan_out"`` that of gradients.
        distribution: ``"normal"`` (default) or ``"uniform"``.
        nonlinearity: Name of the activation, as in ``torch.nn.functional``, or ``"linear"``. None (default): the one
            that follows the layer, with its slope or alpha; gain 1 where none is found.

    Raises:
        ValueError: If an argument is not among the names allowed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> print(Kaiming(mode="fan_out").apply(model)["0.weight"].what)
        Kaiming normal, fan_out 576, gain 1.41 (before ReLU)

    References:
        He, Zhang, Ren, Sun: Delving deep into rectifiers (2015), arXiv 1502.01852.
    """

    def __init__(
        self, mode: Fan = "fan_in", distribution: Distribution = "normal", nonlinearity: str | None = None
    ) -> None:
        self.mode = check_choice("mode", mode, FANS)
        self.distribution = check_choice("distribution", distribution, DISTRIBUTIONS)
        if nonlinearity is not None:
            check_choice("nonlinearity", nonlinearity, ("linear", *ACTIVATION_NAMES))
        self.nonlinearity = nonlinearity

    def kernel(self, param: LayerParameter, call_graph: CallGraph) -> Initializer:
        if self.nonlinearity is not None:
            activation = named_activation(self.nonlinearity) or NO_ACTIVATION
            return kaiming(param, activation.gain, self.mode, self.distribution)
        activation = activation_of(param, call_graph)
        return kaiming(param, activation.gain, self.mode, self.distribution).because(activation)


class Orthogonal(_KernelPolicy):
    r"""Orthogonal initialization: every linear map keeps angles and, up to the gain, lengths.

    .. math:: W W^\top = \text{gain}^2 I \quad \text{or} \quad W^\top W = \text{gain}^2 I

    whichever fits; a convolution's kernel counts as the matrix ``(out / groups, in / groups * prod(kernel))`` of each
    group. For deep linear or tanh networks; for recurrent ones there is :class:`Recurrent`. Written to the same layers
    as :class:`Xavier`.

    Args:
        gain: Factor on the matrix, > 0. None (default): from the activation that follows the layer; 1 where none is
            found.

    Raises:
        TypeError: If ``gain`` is not a number.
        ValueError: If ``gain`` is not positive.

    Example:
        >>> import torch
        >>> layer = nn.Linear(8, 4)
        >>> _ = Orthogonal(gain=2.0).apply(layer)
        >>> torch.allclose(layer.weight @ layer.weight.T, 4 * torch.eye(4), atol=1e-5)
        True

    References:
        Saxe, McClelland, Ganguli: Exact solutions to the nonlinear dynamics of learning in deep linear neural networks
        (2013), arXiv 1312.6120.
    """

    def __init__(self, gain: float | None = None) -> None:
        self.gain = None if gain is None else check_number("gain", gain, above=0)

    def kernel(self, param: LayerParameter, call_graph: CallGraph) -> Initializer:
        if self.gain is not None:
            return orthogonal(param, self.gain)
        activation = activation_of(param, call_graph)
        return orthogonal(param, activation.gain).because(activation)


class Normal(_KernelPolicy):
    r"""Normal values of one standard deviation everywhere, as in BERT and GPT.

    .. math:: W \sim N(0, \text{std}^2)

    Written to kernels, as :class:`Xavier`, and to embeddings, but for their padding rows. Biases become zero; norms are
    left alone.

    Args:
        std: Standard deviation, > 0. Default 0.02.

    Raises:
        TypeError: If ``std`` is not a number.
        ValueError: If ``std`` is not positive.

    Example:
        >>> print(Normal(std=0.02).apply(nn.Embedding(10, 4, padding_idx=0))["weight"].what)
        normal, std 0.02

    References:
        Devlin, Chang, Lee, Toutanova: BERT (2018), arXiv 1810.04805.
    """

    roles = _KernelPolicy.roles | {Role.EMBEDDING}

    def __init__(self, std: float = 0.02) -> None:
        self.std = check_number("std", std, above=0)

    def kernel(self, param: LayerParameter, call_graph: CallGraph) -> Initializer:
        return normal(param, self.std)


class TruncNormal(_KernelPolicy):
    r"""Normal values without outliers: what lies beyond two standard deviations is drawn anew.

    .. math:: W \sim N(0, \text{std}^2) \;\big|\; |W| \le 2\,\text{std}

    ``std`` is that of the normal distribution before it is cut; the values' own is 0.88 of it. The bounds are multiples
    of ``std``, where those of :func:`torch.nn.init.trunc_normal_` are -2 and 2 by default, which cut nothing of a small
    ``std``. Written to the same parameters as :class:`Normal`; common in vision transformers.

    Args:
        std: Standard deviation before the cut, > 0. Default 0.02.

    Raises:
        TypeError: If ``std`` is not a number.
        ValueError: If ``std`` is not positive.

    Example:
        >>> layer = nn.Linear(100, 100)
        >>> _ = TruncNormal(std=0.02).apply(layer)
        >>> bool(layer.weight.abs().max() <= 0.04)
        True

    References:
        Dosovitskiy et al.: An image is worth 16x16 words (2020), arXiv 2010.11929.
    """

    roles = _KernelPolicy.roles | {Role.EMBEDDING}

    def __init__(self, std: float = 0.02) -> None:
        self.std = check_number("std", std, above=0)

    def kernel(self, param: LayerParameter, call_graph: CallGraph) -> Initializer:
        return trunc_normal(param, self.std)
