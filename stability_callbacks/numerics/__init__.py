"""Functions whose value and gradient stay finite at and beyond the boundary of their domain.

A square root at 0, a logarithm of 0 or a division by 0 gives an infinite value or gradient, and one of them in a loss
is enough to make every weight NaN. Masking the result does not help: the masked branch still sends ``0 * inf = NaN``
backwards. These functions choose the *argument* first (the double-where construction), so that the bad branch is never
evaluated at the bad point. Inside the domain they equal the plain functions.

Example:
    >>> import torch
    >>> from stability_callbacks.numerics import safe_sqrt
    >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> safe_sqrt(x).sum().backward()
    >>> x.grad
    tensor([0.0000, 0.2500])
"""

from stability_callbacks.numerics._safe import (
    log1mexp,
    safe_acos,
    safe_div,
    safe_log,
    safe_norm,
    safe_pow,
    safe_sqrt,
)

__all__ = ["log1mexp", "safe_acos", "safe_div", "safe_log", "safe_norm", "safe_pow", "safe_sqrt"]
