"""Adaptive gradient clipping, unit by unit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stability_callbacks._validation import check_bool, check_number, check_pattern
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import (
    GradientNorms,
    NamedParameters,
    Parameters,
    local_values,
    measure_gradients,
    named_parameters,
    scale_each_gradient_,
    tensor_norms,
    writable_values,
)

__all__ = ["AGC", "unit_norms"]

_LEAST_GRADIENT = 1e-6


def unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm of each unit of a weight, in float32 or better, shaped to broadcast against it.

    A unit is what feeds one output: a row of a linear layer's or an embedding's weight, a filter of a convolution (of
    any rank). A vector, such as a bias or a scale, is one unit, and so is a single number.

    Args:
        tensor: A dense weight, or its gradient.

    Returns:
        Shape ``[units, 1, ...]``; ``[1]`` for a vector, ``[]`` for a number.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5.],
                [0.]])
    """
    dtype = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
    if tensor.is_complex():
        tensor = tensor.abs()
    if tensor.dim() == 0:
        return tensor.abs().to(dtype)
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else (0,)
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, dim=dims, keepdim=True, dtype=dtype)
    return norms


class AGC(ClipRule):
    r"""Clip each unit's gradient where it is large compared with the unit's weight.

    The clipping that made networks without normalization layers trainable at large batch sizes. Exclude the classifier,
    as the paper does: by name, or with ``exclude_last_layer``.

    .. math:: g_u \leftarrow g_u \cdot \min\Big(1,
              \frac{\text{clip} \cdot \max(\lVert w_u \rVert, \epsilon)}{\max(\lVert g_u \rVert, 10^{-6})}\Big)

    for each unit :math:`u`: see :func:`unit_norms`. A transposed convolution keeps its outputs in its second dimension,
    which a weight does not show: its units are its inputs. A non-finite total norm leaves everything untouched.

    Args:
        clip: Largest ratio of gradient to weight norm, > 0. Default 0.01.
        eps: Weight norms count for at least this, so that zero-initialized weights can train, > 0. Default 1e-3.
        exclude: Regular expressions, searched in the full parameter name: parameters to leave alone. They need named
            parameters. Default: none.
        exclude_last_layer: Whether to leave the last layer alone too: the one that owns the last weight of two or more
            dimensions, with its bias, in the order in which the model defines its parameters. That is the classifier
            of the usual networks. Where something else is defined after it (a second head, a loss with weights of its
            own), name it by ``exclude`` instead. Among the parameters of all optimizers inside ``GradientClipping``,
            among those of the group inside :class:`PerGroup`, else among those given to :meth:`clip_`, which must have
            names. Default False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range, or a pattern is not a regular expression; in :meth:`clip_`, if
            the last layer is wanted and the parameters have no names.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.ones(2)
        >>> _ = AGC().clip_([("bias", weight)])
        >>> weight.grad
        tensor([7.0711e-06, 7.0711e-06])

    References:
        Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization (2021),
        arXiv 2102.06171.
    """

    def __init__(
        self, clip: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = (), exclude_last_layer: bool = False
    ) -> None:
        self.clip = check_number("clip", clip, above=0)
        self.eps = check_number("eps", eps, above=0)
        if isinstance(exclude, str) or not isinstance(exclude, Sequence):
            raise TypeError(f"`exclude` must be a sequence of regular expressions, got {exclude!r}")
        self.exclude = tuple(exclude)
        self._patterns = [check_pattern(f"exclude[{index}]", item) for index, item in enumerate(self.exclude)]
        self.exclude_last_layer = check_bool("exclude_last_layer", exclude_last_layer)
        self._last_layer: str | None = None

    def __repr__(self) -> str:
        return (
            f"AGC(clip={self.clip:g}, eps={self.eps:g}, exclude={self.exclude!r}, "
            f"exclude_last_layer={self.exclude_last_layer})"
        )

    def assign(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        parameters = list(parameters)
        names = [name for name, _ in parameters]
        for pattern in self._patterns:
            if not any(map(pattern.search, names)):
                few = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                text = (
                    f"AGC(exclude=[{pattern.pattern!r}]) matches no parameter, so it excludes nothing; there are: {few}"
                )
                warnings.warn(text, stacklevel=2)
        if self.exclude_last_layer:
            weights = [name for name, parameter in parameters if parameter.dim() > 1]
            if weights and all(name.isdigit() for name in weights):
                raise ValueError("AGC(exclude_last_layer=True) needs named parameters: give it `named_parameters()`")
            self._last_layer = _owner(weights[-1]) if weights else None

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        every = named_parameters(parameters)
        if self.exclude_last_layer and self._last_layer is None:
            self.assign(every)
        pairs = NamedParameters(pair for pair in every if pair[1].grad is not None)
        norms = self.measure(pairs, norms)
        finite = torch.isfinite(norms.total)
        excluded = {index for index, (name, _) in enumerate(pairs) if self._excludes(name)}
        clipped = list(norms.per_tensor.unbind())
        applied = [norms.per_tensor[:0]]
        # A vector is one unit, so its gradient's norm is known and the weights' norms are measured together.
        vectors = [index for index, (_, each) in enumerate(pairs) if index not in excluded and each.dim() <= 1]
        if vectors:
            known = torch.stack([clipped[index] for index in vectors])
            weights = tensor_norms([pairs[index][1].detach() for index in vectors]).to(known)
            factors = self._factor(known, weights, finite)
            scale_each_gradient_([pairs[index] for index in vectors], factors)
            applied.append(factors)
            for index, norm in zip(vectors, (known * factors).unbind(), strict=True):
                clipped[index] = norm
        for index, (_, parameter) in enumerate(pairs):
            if index not in excluded and parameter.dim() > 1:
                norm, factors = self._clip_units(parameter, finite)
                clipped[index] = norm.to(norms.per_tensor)
                applied.append(factors.to(norms.per_tensor))
        if any(isinstance(parameter, DTensor) for _, parameter in pairs):
            # Other ranks have clipped units of the same tensors.
            return ClipResult.between(norms.total, measure_gradients(pairs).total)
        if not clipped:
            return ClipResult.between(norms.total, norms.total)
        return ClipResult.from_parts(norms.total, torch.stack(clipped), torch.cat(applied))

    def _excludes(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._patterns) or (
            self._last_layer is not None and _owner(name) == self._last_layer
        )

    def _factor(self, gradient: Tensor, weight: Tensor, finite: Tensor) -> Tensor:
        factor = (self.clip * weight.clamp(min=self.eps) / gradient.clamp(min=_LEAST_GRADIENT)).clamp(max=1.0)
        return torch.where(finite.to(factor.device), factor, 1.0)

    def _clip_units(self, parameter: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient of a weight with several units; returns its norm then, and the units' factors."""
        gradient, weight = parameter.grad, local_values(parameter.detach())
        assert gradient is not None
        if isinstance(gradient, DTensor) and any(p.is_shard() and not p.is_shard(0) for p in gradient.placements):
            raise ValueError(
                f"AGC needs whole units on each rank, so tensors sharded along their first dimension; got "
                f"{gradient.placements}"
            )
        if gradient.layout == torch.sparse_coo:
            parameter.grad = gradient = gradient.coalesce()
            weight = weight[gradient.indices()[0]]
        norms = unit_norms(local_values(gradient))
        factor = self._factor(norms, unit_norms(weight), finite)
        writable_values(gradient).mul_(factor.unsqueeze(-1) if gradient.is_complex() else factor)
        clipped: Tensor = torch.linalg.vector_norm(norms * factor)
        return clipped, factor.flatten()


def _owner(name: str) -> str:
    """The module that owns a parameter, also where it is parametrized: then its parts lie in modules below."""
    module, parametrized, _ = name.partition(".parametrizations.")
    return module if parametrized else name.rpartition(".")[0]
