"""The double-where construction, applied to the functions that need it most."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log1mexp", "safe_acos", "safe_div", "safe_log", "safe_norm", "safe_pow", "safe_sqrt"]

_LOG_2 = math.log(2.0)


def safe_sqrt(x: Tensor, eps: float | None = None) -> Tensor:
    r"""Square root that is 0, with gradient 0, at and below 0.

    .. math:: f(x) = \sqrt{x} \text{ for } x \ge \epsilon, \quad 0 \text{ otherwise}

    Args:
        x: Any shape, floating point.
        eps: Start of the domain. Default: the dtype's smallest normal number.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> safe_sqrt(torch.tensor([-1.0, 0.0, 9.0]))
        tensor([0., 0., 3.])
    """
    inside = x >= (_tiny(x) if eps is None else eps)
    return torch.where(inside, torch.sqrt(torch.where(inside, x, 1.0)), 0.0)


def safe_log(x: Tensor, eps: float | None = None) -> Tensor:
    r"""Logarithm that stays at its value in ``eps``, with gradient 0, below it.

    .. math:: f(x) = \log \max(x, \epsilon)

    Args:
        x: Any shape, floating point.
        eps: Start of the domain. Default: the dtype's smallest normal number.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> safe_log(torch.tensor([0.0, 1.0]), eps=1e-6)
        tensor([-13.8155,   0.0000])
    """
    eps = _tiny(x) if eps is None else eps
    inside = x >= eps
    return torch.where(inside, torch.log(torch.where(inside, x, 1.0)), math.log(eps))


def safe_div(numerator: Tensor, denominator: Tensor, default: float = 0.0, eps: float | None = None) -> Tensor:
    r"""Quotient that is a given value, with gradient 0, where the denominator is (close to) 0.

    .. math:: f(a, b) = a / b \text{ for } |b| \ge \epsilon, \quad \text{default otherwise}

    Args:
        numerator: Floating point; broadcasts against the denominator.
        denominator: Floating point.
        default: The value where the denominator vanishes. Default 0.
        eps: Smallest magnitude of a denominator. Default: the square root of the dtype's smallest normal number, where
            the gradient ``a / b**2`` is still finite for an ``a`` around 1 (1.1e-19 in float32, 0.008 in float16).

    Returns:
        The broadcast shape.

    Example:
        >>> safe_div(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]))
        tensor([0.0000, 0.5000])
    """
    inside = denominator.abs() >= (math.sqrt(_tiny(denominator)) if eps is None else eps)
    return torch.where(inside, numerator / torch.where(inside, denominator, 1.0), default)


def safe_norm(
    x: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False, eps: float | None = None
) -> Tensor:
    r"""Euclidean norm that is 0, with gradient 0 of every order, for a zero vector; large entries do not overflow it.

    .. math:: f(x) = m \, \Big\lVert \frac{x}{m} \Big\rVert_2, \quad m = \max_i |x_i|; \qquad
              0 \text{ where } m < \epsilon

    Args:
        x: Any shape, floating point.
        dim: Dimensions to reduce. Default: all.
        keepdim: Whether reduced dimensions stay, with length 1.
        eps: Vectors whose largest entry is smaller than this count as zero. Default: the dtype's smallest normal
            number.

    Returns:
        The norms.

    Example:
        >>> x = torch.zeros(3, requires_grad=True)
        >>> safe_norm(x).backward()
        >>> x.grad
        tensor([0., 0., 0.])
    """
    dims = tuple(range(x.dim())) if dim is None else dim
    if not x.dim():
        return torch.where(x.abs() >= (_tiny(x) if eps is None else eps), x.abs(), 0.0)
    largest = x.detach().abs().amax(dims, keepdim=True)
    inside = largest >= (_tiny(x) if eps is None else eps)
    largest = torch.where(inside, largest, 1.0)
    scaled = torch.where(inside, x / largest, 1.0)
    norm = torch.where(inside, largest * scaled.square().sum(dims, keepdim=True).sqrt(), 0.0)
    return norm if keepdim else norm.squeeze(dims)


def safe_acos(x: Tensor) -> Tensor:
    r"""Arc cosine with gradient 0 at and beyond -1 and 1, where its own is infinite or undefined.

    .. math:: f(x) = \arccos(\operatorname{clamp}(x, -1, 1))

    Args:
        x: Any shape, floating point; cosines that rounding may have pushed outside.

    Returns:
        The shape and dtype of ``x``, in :math:`[0, \pi]`.

    Example:
        >>> safe_acos(torch.tensor([1.0000001, 0.0]))
        tensor([0.0000, 1.5708])
    """
    inside = x.abs() < 1
    return torch.where(inside, torch.acos(torch.where(inside, x, 0.0)), torch.where(x > 0, 0.0, math.pi).to(x.dtype))


def safe_pow(x: Tensor, exponent: float | Tensor, eps: float | None = None) -> Tensor:
    r"""Power of a non-negative number whose value stays that in ``eps``, with gradient 0, below it.

    .. math:: f(x) = \max(x, \epsilon)^p

    Args:
        x: Floating point; broadcasts against the exponent.
        exponent: A number, or a tensor, which gets a gradient too.
        eps: Start of the domain. Default: for positive exponents the dtype's smallest normal number; with others, whose
            value grows without bound, its fourth root (1e-10 in float32), so that squares of the reciprocal are finite.

    Returns:
        The broadcast shape.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> safe_pow(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.2500])
    """
    exponents = torch.as_tensor(exponent, dtype=x.dtype, device=x.device)
    if eps is None:
        tiny = torch.full_like(exponents, _tiny(x))
        least = torch.where(exponents > 0, tiny, tiny**0.25)
    else:
        least = torch.full_like(exponents, eps)
    inside = x >= least
    beyond = torch.pow(least, exponents.detach()) * torch.ones_like(x)
    return torch.where(inside, torch.pow(torch.where(inside, x, 1.0), exponents), beyond)


def log1mexp(x: Tensor, eps: float | None = None) -> Tensor:
    r"""Logarithm of one minus an exponential, accurate near 0 and far from it: a log-probability's complement.

    .. math:: f(x) = \log(1 - e^{-|x|})

    Args:
        x: Any shape, floating point. Its sign does not matter.
        eps: Smallest magnitude; below it the value stays that in ``eps``, with gradient 0. Default: the dtype's
            smallest normal number.

    Returns:
        The shape and dtype of ``x``, at most 0.

    Example:
        >>> log1mexp(torch.tensor([1e-10, 10.0]))
        tensor([-2.3026e+01, -4.5401e-05])

    References:
        Mächler: Accurately computing log(1 - exp(-|a|)) (2012), vignette of the R package Rmpfr.
    """
    eps = _tiny(x) if eps is None else eps
    magnitude = x.abs()
    inside = magnitude >= eps
    near = inside & (magnitude < _LOG_2)
    small = torch.log(-torch.expm1(-torch.where(near, magnitude, 1.0)))
    large = torch.log1p(-torch.exp(-torch.where(near, 1.0, torch.where(inside, magnitude, 1.0))))
    return torch.where(inside, torch.where(near, small, large), math.log(-math.expm1(-eps)))


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
