"""Parameters and their names: each parameter once, under its full name, and the layer that owns it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["NamedParameters", "Parameters", "layer_of", "named_gradients", "named_parameters"]

Parameters = Tensor | Iterable[Tensor | tuple[str, Tensor]]
"""Parameters, or ``(name, parameter)`` pairs as ``module.named_parameters()`` gives them; or one parameter."""


class NamedParameters(list[tuple[str, Tensor]]):
    """``(name, parameter)`` pairs, each parameter once, which need not be looked through again."""


def named_parameters(parameters: Parameters) -> NamedParameters:
    """Give every parameter a name and drop repetitions, so that tied parameters count once.

    Args:
        parameters: Parameters, or ``(name, parameter)`` pairs. Unnamed ones are named by their position.

    Returns:
        ``(name, parameter)`` pairs, in order, each parameter once.

    Raises:
        TypeError: If an item is neither a tensor nor a pair, as when a module itself is passed.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> [name for name, _ in named_parameters([weight, weight, torch.ones(1)])]
        ['0', '2']
    """
    if isinstance(parameters, NamedParameters):
        return parameters
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif not isinstance(parameters, Iterable):
        raise _not_parameters(parameters)
    unique: dict[int, tuple[str, Tensor]] = {}
    for position, item in enumerate(parameters):
        if isinstance(item, Tensor):
            unique.setdefault(id(item), (str(position), item))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            unique.setdefault(id(item[1]), item)
        else:
            raise _not_parameters(item)
    return NamedParameters(unique.values())


def named_gradients(parameters: Parameters) -> NamedParameters:
    """The parameters that have a gradient, named; see :func:`named_parameters`."""
    return NamedParameters(pair for pair in named_parameters(parameters) if pair[1].grad is not None)


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: the module that owns it, or itself if that is the root module.

    Args:
        name: Full parameter name.

    Returns:
        Full module name.

    Example:
        >>> layer_of("net.0.weight"), layer_of("scale")
        ('net.0', 'scale')
    """
    return name.rpartition(".")[0] or name


def _not_parameters(value: object) -> TypeError:
    return TypeError(
        "`parameters` must be parameters or (name, parameter) pairs, such as `model.parameters()` or "
        f"`model.named_parameters()`, got {value!r} of type {type(value).__name__}"
    )
