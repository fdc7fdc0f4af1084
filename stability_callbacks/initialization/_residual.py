"""Policies for residual networks: branches that start small, so that depth does not add up."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from stability_callbacks._validation import check_instance, check_number, check_pattern
from stability_callbacks.initialization._branches import residual_layers
from stability_callbacks.initialization._call_graph import CallGraph
from stability_callbacks.initialization._initializers import Initializer, constant, normal
from stability_callbacks.initialization._layer_parameters import LayerParameter, Role, layer_parameters
from stability_callbacks.initialization._policy import LeaveAlone, Plan, Policy

__all__ = ["DepthScaled", "ZeroResidual"]

_PROJECTIONS = (nn.Linear, _ConvNd)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class DepthScaled(Policy):
    r"""GPT-2's initialization: normal everywhere, and smaller where residual branches end.

    .. math:: W \sim N(0, \text{std}^2), \qquad W_{\text{residual}} \sim N\Big(0, \frac{\text{std}^2}{N}\Big)

    where ``N`` is the number of residual branches, :math:`2L` in a Transformer of :math:`L` layers. Each branch adds to
    the stream; so scaled, all of them together add as much as a single one, whatever the depth. Kernels and embeddings
    are normal (padding rows zero), biases zero, norms of ``torch.nn`` have scale 1 and shift 0.

    The last projection of each branch is found where a ``forward`` method adds to a value what it computed from it
    (``x + self.mlp(self.norm(x))``), as :class:`Auto` finds activations, and in torch's own Transformer layers.

    Args:
        std: Standard deviation, > 0. Default 0.02.
        residual: A regular expression searched in the names of kernels: those that end a residual branch. None
            (default): they are found.

    Raises:
        TypeError: If ``std`` is not a number or ``residual`` not a string.
        ValueError: If ``std`` is not positive, or ``residual`` not a regular expression. When applied: if no residual
            branch is found, or nothing matches ``residual``.

    Example:
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2)
        >>> model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> report = DepthScaled(std=0.02).apply(model)
        >>> print(report["layers.0.linear1.weight"].what, "|", report["layers.0.linear2.weight"].what)
        normal, std 0.02 | normal, std 0.01 (ends 1 of 4 residual branches)

    References:
        Radford et al.: Language models are unsupervised multitask learners (2019).
    """

    def __init__(self, std: float = 0.02, residual: str | None = None) -> None:
        self.std = check_number("std", std, above=0)
        if residual is not None:
            check_pattern("residual", residual)
        self.residual = residual

    def plan(self, model: nn.Module) -> Plan:
        plan = dict(super().plan(model))
        ends = self._residual_kernels(model)
        std = self.std / math.sqrt(len(ends))
        for param in ends:
            if param.name in plan:
                plan[param.name] = normal(param, std).because(f"ends 1 of {len(ends)} residual branches")
        return plan

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        if param.role in (Role.KERNEL, Role.HIDDEN_KERNEL, Role.EMBEDDING):
            return normal(param, self.std)
        constants = {Role.BIAS: 0.0, Role.NORM_SCALE: 1.0, Role.NORM_SHIFT: 0.0}
        return constant(constants[param.role]) if param.role in constants else None

    def _residual_kernels(self, model: nn.Module) -> list[LayerParameter]:
        kernels = [param for param in layer_parameters(model) if param.role is Role.KERNEL]
        if self.residual is not None:
            pattern = check_pattern("residual", self.residual)
            ends = [param for param in kernels if pattern.search(param.name)]
        else:
            layers = set(residual_layers(CallGraph(model), _PROJECTIONS))
            ends = [param for param in kernels if param.module_name in layers]
        if not ends:
            names = ", ".join(param.name for param in kernels)
            raise ValueError(
                f"`residual` must be found in the name of a kernel that ends a residual branch, got {self.residual!r},"
                f" with which none is; the kernels are {names}"
            )
        return ends


class ZeroResidual(Policy):
    r"""Residual branches that start as nothing: the network begins as its shortcuts alone and grows from there.

    .. math:: x + \gamma \cdot f(x), \quad \gamma = 0

    The last norm of each residual branch gets scale and shift 0; where a branch ends in a projection instead, that gets
    weight and bias 0. Its gradient is not zero, so it learns at once; the rest of the branch follows after one step.
    For deep residual networks, high learning rates, and networks without norms. Branches are found as by
    :class:`DepthScaled`.

    Args:
        base: What to write into the other parameters. None (default): they are left alone.

    Raises:
        TypeError: If ``base`` is not a policy. Or one that needs a batch: zeros would distort what it measures.
        ValueError: When applied: if no residual branch is found.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        ...
        ...     def forward(self, x):
        ...         return x + self.body(x)
        >>> for row in ZeroResidual().apply(Block()):
        ...     print(f"{row.name}: {row.what}")
        body.0.weight: left alone: kernel kept, ZeroResidual has no rule for it
        body.0.bias: left alone: bias kept, ZeroResidual has no rule for it
        body.1.weight: zeros (ends a residual branch)
        body.1.bias: zeros (ends a residual branch)

    References:
        Goyal et al.: Accurate, large minibatch SGD (2017), arXiv 1706.02677.
        Zhang, Dauphin, Ma: Fixup initialization (2019), arXiv 1901.09321.
    """

    def __init__(self, base: Policy | None = None) -> None:
        if base is not None:
            check_instance("base", base, Policy, "a policy or None")  # type: ignore[type-abstract]
            if base.needs_batch:
                raise TypeError(f"`base` must be a policy that needs no batch, got {base!r}")
        self.base = base

    def plan(self, model: nn.Module) -> Plan:
        layers = set(residual_layers(CallGraph(model), (*_PROJECTIONS, *_NORMS)))
        if not layers:
            raise ValueError(
                "`model` must have a residual branch (`x + f(x)` in a forward method), got none that is found"
            )
        plan = dict(super().plan(model) if self.base is None else self.base.plan(model))
        for param in layer_parameters(model):
            if param.module_name in layers and param.role is not Role.UNKNOWN and param.name in plan:
                plan[param.name] = constant(0).because("ends a residual branch")
        return plan

    def rule(self, param: LayerParameter, call_graph: CallGraph) -> Initializer | LeaveAlone | None:
        return None if self.base is None else self.base.rule(param, call_graph)
