"""Optimizer settings that ruin weights from finite gradients."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from stability_callbacks.diagnosis._reasons import type_name
from stability_callbacks.diagnosis._values import is_finite

__all__ = ["describe_settings", "vanishing_eps"]

_SHOWN = ("lr", "betas", "momentum", "eps", "weight_decay")


def vanishing_eps(optimizer: Optimizer) -> str | None:
    r"""Tell whether weights are not finite where an optimizer's ``eps`` is 0 in their type.

    Adam divides by :math:`\sqrt{v} + \epsilon`. In float16 the default of 1e-8 is 0, and so is the square of a small
    gradient: the update is then 0 / 0. A rollback can't help, since the same arithmetic follows.

    Args:
        optimizer: The optimizer, after an update. The host waits for the device.

    Returns:
        The group, what is wrong, and which setting to change; None if it is not that.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([float("nan")], dtype=torch.float16))
        >>> print(vanishing_eps(torch.optim.Adam([weight])))
        eps=1e-08 is 0 in float16 (parameter group 0 of Adam): set eps=1e-4, or train in 'bf16-mixed' or '16-mixed'
        >>> vanishing_eps(torch.optim.Adam([weight], eps=1e-4)) is None
        True
    """
    for index, group in enumerate(optimizer.param_groups):
        eps = group.get("eps")
        if not isinstance(eps, float) or eps <= 0:
            continue
        for parameter in group["params"]:
            if torch.tensor(eps, dtype=parameter.dtype) == 0 and not is_finite(parameter.detach()):
                return (
                    f"eps={eps:g} is 0 in {type_name(parameter.dtype)} "
                    f"(parameter group {index} of {type(optimizer).__name__}): "
                    "set eps=1e-4, or train in 'bf16-mixed' or '16-mixed'"
                )
    return None


def describe_settings(optimizer: Optimizer) -> str:
    """An optimizer's name and the settings that decide how large its updates are, of the first parameter group.

    Example:
        >>> describe_settings(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e20))
        'SGD(lr=1e+20, momentum=0, weight_decay=0)'
    """
    group = optimizer.param_groups[0]
    settings = ", ".join(f"{name}={_text(group[name])}" for name in _SHOWN if name in group)
    return f"{type(optimizer).__name__}({settings})"


def _text(value: object) -> str:
    return f"{float(value):g}" if isinstance(value, (int, float, torch.Tensor)) else str(value)
